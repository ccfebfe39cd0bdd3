"""A short mark of a base's weights, to tell whether an adapter belongs to it.

Two hashes: one over the names and shapes of the parameters, one over a sample of their values rounded to bfloat16, so
that a base in float32 and its copy in bfloat16 have the same. Of quantised and sharded weights the shapes count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core.attach import find_state, named_parts
from ..core.graft import graft_of
from ..core.part import Trained
from ..model.anatomy import Site
from ..model.weights import Weight, is_quantised

RUNS, LENGTH = 4, 16
"""Stretches of values taken of each parameter, and their length: a base that is mapped from its file and not read yet
must be read at few places only."""


def fingerprint(model: nn.Module, without: Iterable[Site] = ()) -> str:
    """`<names and shapes>:<values>` of the base below whatever is attached, each 16 hexadecimal digits.

    The second is empty where values cannot be read as they were trained: quantised, sharded or on the meta device.
    `without` are the parameters that an adapter brings itself, such as a new head, which is another in every base.
    """
    brought = {f"{site.path}.{site.parameter or 'weight'}".lstrip(".") for site in without}
    shapes, values = hashlib.sha256(), hashlib.sha256()
    readable = True
    originals = _originals(model)
    for name, parameter in sorted(model.named_parameters()):
        path, _, own = name.rpartition(".")
        if "deltaworks" in name.split("."):
            continue
        parameter = originals.get(name, parameter)
        shape = Weight(model.get_submodule(path), own).full_shape if is_quantised(parameter) else tuple(parameter.shape)
        shapes.update(f"{name} {list(shape)}\n".encode())
        readable &= not (is_quantised(parameter) or parameter.is_meta or hasattr(parameter, "full_tensor"))
        if readable and name not in brought:
            values.update(_sample(parameter.detach()))
    return f"{shapes.hexdigest()[:16]}:{values.hexdigest()[:16] if readable else ''}"


def same(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one base; missing values say nothing against it."""
    (shapes, values), (other_shapes, other_values) = (mark.split(":") for mark in (one, other))
    return shapes == other_shapes and (not values or not other_values or values == other_values)


def _sample(value: Tensor) -> bytes:
    flat = value.reshape(-1)
    step = max(flat.numel() // RUNS, LENGTH)
    taken = torch.cat([flat[start : start + LENGTH] for start in range(0, RUNS * step, step)])
    rounded = taken.to(torch.bfloat16).cpu().contiguous()
    return bytes(rounded.view(torch.uint8).tolist())


def _originals(model: nn.Module) -> dict[str, Tensor]:
    """The base's own values of parameters that a merge or training in place has replaced, by name."""
    found: dict[str, Tensor] = {}
    state = find_state(model)
    if state is None:
        return found
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for adapter in state.board.active:
        for _, part in named_parts(model, adapter):
            if isinstance(part, Trained) and part.pristine is not None:
                # The first that entered holds the base's value, later ones hold their forerunner's.
                found.setdefault(names.get(id(trained_parameter(model, part)), ""), part.pristine)
    for path, module in model.named_modules():
        graft = graft_of(module)
        for parameter, stored in graft.backup.items() if graft is not None else ():
            if stored is not None:
                found.setdefault(f"{path}.{parameter}" if path else parameter, stored)
    return found


def trained_parameter(model: nn.Module, part: Trained) -> Tensor:
    """The base's parameter that a part trains, never a merged copy of it."""
    module, own = model.get_submodule(part.site.path), part.site.parameter or "weight"
    graft = graft_of(module)
    stored = graft.backup.get(own) if graft is not None else None
    return module.get_parameter(own) if stored is None else stored
