"""Starts that a file need not hold: the frozen factors that a method subtracts, made again when it is opened.

PiSSA and its kin keep the factors they start from (`a0`, `b0`) beside those that train. `leave_out` takes them from
what is written and puts the seed and a hash of every part's start in their place; `again` makes them as `attach` did,
by the method's own page with the same random numbers. Who opens the file compares hashes, so that another base or
another machine's arithmetic is noticed. This is the only place where opening a file runs a page; a page is asked for no
more than any start takes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.attach import disable
from ..core.experts import PerExpert
from ..core.method import Method
from ..core.operators.chain import Chain
from ..core.operators.low_rank import LowRank
from ..core.part import Part
from ..core.tuned import Tuned
from ..model.anatomy import describe
from .native import Values, tensor_name
from .weights import whole

STEPS = 1 << 12
"""Operations that the start of one matrix may take; a fast SVD takes a hundred."""
LARGEST = 1 << 16
"""Whole numbers among a method's hyper-parameters that a start may be made with, seeds left out."""


def start_of(tensors: Values) -> Values:
    """Those of a part's tensors that are the start it subtracts; stacks and lists of tensors number theirs."""
    return {name: value for name, value in tensors.items() if re.split(r"\.|__", name)[0] in ("a0", "b0")}


def digest(start: Values) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    mark = hashlib.sha256()
    for name, value in sorted(start.items()):
        mark.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        mark.update(whole(value).contiguous().flatten().view(torch.uint8).numpy().data)
    return mark.hexdigest()


def as_kept(start: Values, kept: Values) -> Values:
    """A start in the precision of the tensors beside it, as `attach` brings both to their place."""
    dtype = next((value.dtype for value in kept.values() if value.is_floating_point()), torch.float32)
    return {name: value.to(dtype) for name, value in start.items()}


def leave_out(handle: Tuned, config: dict[str, Any], values: Values) -> None:
    """Take the starts out of an adapter as its two files hold it, in place.

    Raises:
        ValueError: when there is none, or one that would not be made again the same, here and now.
    """
    adapter = handle.state.adapters[handle.name]
    slug, instead = adapter.method.slug, 'save it with start="values"'
    if not any(start_of(part.tensors()) for part in handle.parts()):
        raise ValueError(f"{slug}: no part subtracts a start that could be left out; {instead}")
    made = again(handle.model, adapter.method, adapter.seed)
    for item, part in zip(config["parts"], handle.parts(), strict=True):
        tensors = part.tensors()
        start = start_of(tensors)
        if not start:
            continue
        mark = digest(start)
        if mark != digest(as_kept(made.get((item["path"], item["label"]), {}), tensors)):
            seen = f"seed={adapter.seed} gives another on this base and device"
            seen = "it was attached without a seed" if adapter.seed is None else seen
            raise ValueError(f"{slug}: the start of {part.site.name} cannot be made again, {seen}; {instead}")
        item["start"] = mark
        for inner in start:
            del item["tensors"][inner]
            del values[tensor_name(item["path"], item["label"], item["parameter"], inner)]


@torch.no_grad()
def again(model: nn.Module, method: Method, seed: int | None) -> dict[tuple[str, str], Values]:
    """The starts of a method's parts on a base, by module and label, on the CPU.

    Args:
        model: the base, whatever is attached to it.
        method: the method as it was attached.
        seed: what `attach` was given; None where it was given none, which only starts without random numbers forgive.

    Raises:
        ValueError: when the method measures data, or asks for more than a start takes.
    """
    slug = method.slug
    if method.needs_data:
        raise ValueError(f'{slug}: its start comes from data and cannot be made again; save it with start="values"')
    for name, value in (pair for one in _all(method) for pair in _numbers(one.settings())):
        if "seed" not in name and abs(value) > LARGEST:
            raise ValueError(f"{slug}: {name}={value} is no size that a start can be made again with")
    try:
        with disable(model), torch.random.fork_rng(devices=[]):
            base = describe(model)
            torch.default_generator.manual_seed(seed or 0)
            placed = []
            with _Modest(model) as modest:
                for item in method.parts(base, method.shared(base), None):
                    placed.append(item)
                    modest.steps = modest.each
    except ValueError:
        raise
    except Exception as error:  # whatever a page makes of a base, or of numbers, that it was not written for
        raise ValueError(f"{slug}: its start cannot be made on this base: {type(error).__name__}: {error}") from None
    found = {(item.site.path, item.label): start_of(item.part.tensors()) for item in placed}
    return {place: {name: whole(value) for name, value in start.items()} for place, start in found.items() if start}


def without_start(part: Part) -> Part:
    """The part that is left when its start is in the base's weight instead."""
    settings = inner = part.configuration()
    if isinstance(part, PerExpert):
        settings["inner"] = inner = dict(part.inner)
    if "subtract" in inner:
        inner["subtract"] = False
    if settings.get("kind") == Chain.__name__:  # a chain is one that has finished links
        settings["kind"] = LowRank.__name__
    kind = LowRank if isinstance(part, Chain) else type(part)
    tensors = part.tensors()
    kept = {name: value.detach().clone() for name, value in tensors.items() if name not in start_of(tensors)}
    return kind.remade(settings, kept, {key: part.get_submodule(key) for key in part.borrowed})


def _all(method: Method) -> Iterator[Method]:
    """A method and those it is made of, which have read the numbers that were given as text."""
    yield method
    for one in method.made_of():
        yield from _all(one)


def _numbers(settings: Any, name: str = "") -> list[tuple[str, int]]:
    """The whole numbers in a method's hyper-parameters, those of overrides and lists included."""
    if isinstance(settings, dict):
        return [pair for key, value in settings.items() for pair in _numbers(value, str(key))]
    if isinstance(settings, (list, tuple)):
        return [pair for value in settings for pair in _numbers(value, name)]
    return [(name, settings)] if type(settings) is int else []


class _Modest(TorchDispatchMode):
    """Within it, so many operations may run and so many values be drawn or filled as starts of a base can need."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        shapes = [parameter.shape for parameter in model.parameters()]
        self.steps = self.each = STEPS * max((shape[0] for shape in shapes if len(shape) == 3), default=1)
        self.values = 4 * sum(map(prod, shapes)) + (1 << 26)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps -= 1
        if not any(isinstance(arg, Tensor) for arg in args):
            sizes = next((arg for arg in args if isinstance(arg, (list, tuple))), args[:2])
            self.values -= prod(max(size, 1) for size in sizes if type(size) is int)
        if self.steps < 0 or self.values < 0:
            raise ValueError("the hyper-parameters ask for more than any start of this base takes")
        return func(*args, **(kwargs or {}))
