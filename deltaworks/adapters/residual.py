"""A base with a method's start moved out of it, and the plain adapter that belongs on it: the papers' own form.

PiSSA's paper trains A and B on the residual W - s B0 A0. Here the base stays and the start is subtracted beside it;
this writes the other form, for programs that know nothing of starts. The adapter then has the method's own rank.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.attach import detach, state_of, tuned
from ..core.method import weight_at
from ..core.part import Module, Part
from ..core.tuned import Tuned
from ..model.weights import is_quantised
from . import native
from .files import CONFIG, OWN, WEIGHTS, Replacement, write_json
from .starts import start_of, without_start
from .store import library_version
from .weights import write_tensors

BASE = "model.safetensors"
"""Where the base's values stand when it has no `save_pretrained` of its own."""


@torch.no_grad()
def export_residual(model: nn.Module | Tuned, path: str | Path, *, name: str | None = None, beside: Any = None) -> Path:
    """Write a base without an adapter's start, and the adapter without it, as one folder.

    The base is written by its own `save_pretrained`, or as a state dict in `model.safetensors`; it is rounded as its
    weights are, which in half precision loses what training in small steps has won. `dw.load(base, path)` on the base
    opened from there has the same outputs, and warns on any other base. Takes memory for a second base.

    Args:
        model: the adapted model, or the handle `attach` gave; it stays as it is.
        path: the folder, which must not exist.
        name: which adapter; the last one attached when there are several and none is named.
        beside: what is saved with it by its own `save_pretrained`, such as a tokenizer.

    Returns:
        The folder.

    Raises:
        ValueError: when the folder exists, no part subtracts a start, or a weight cannot take the residual.
        OSError: when the folder cannot be written; nothing is left of it.
    """
    whole = model.model if isinstance(model, Tuned) else model
    handle = model if isinstance(model, Tuned) and name is None else tuned(whole, name)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; give a folder that does not, so that no two bases are mixed")
    _check(handle)
    moved = Tuned(copy.deepcopy(whole), handle.name)
    for other in [other for other in moved.state.adapters if other != moved.name]:
        detach(moved.model, other)
    for label, part in list(moved.named_parts()):
        if start_of(part.tensors()):
            plain = without_start(part)
            _shift(moved.model, part, plain)
            moved.exchange(label, plain)
    config, values = native.describe_adapter(moved.model, moved.name, library_version())
    config["base"]["name"] = os.path.abspath(path)
    with Replacement(path, OWN) as folder:
        write_json(folder / CONFIG, config)
        write_tensors(folder / WEIGHTS, values)
        base = detach(moved.model)  # now, as the learned values of what the adapter trains in place are in the base
        if hasattr(base, "save_pretrained"):
            base.save_pretrained(folder)  # type: ignore[operator]
        else:
            write_tensors(folder / BASE, base.state_dict(), finite=False)
        if beside is not None:
            beside.save_pretrained(folder)
    return Path(path)


def _check(handle: Tuned) -> None:
    """Whether every weight with a start can take the residual in its place."""
    state, slug = state_of(handle.model), handle.method.slug
    if state.board.merged:
        raise ValueError(f"{', '.join(state.board.merged)} is merged into the base; call dw.unmerge(model) first")
    modules = handle.model.modules()
    owners = Counter(id(value) for module in modules for value in module._parameters.values() if value is not None)
    moving, staying = [], set()
    for part in handle.parts():
        if start_of(part.tensors()):
            moving.append(part)
        elif not isinstance(part, Module):  # which acts on activations
            staying.add((part.site.path, part.site.parameter or "weight"))
    if not moving:
        raise ValueError(f"{slug}: no part subtracts a start, so the base is its own residual; call dw.save")
    for part in moving:
        site, stored = part.site, weight_at(handle.model, part.site).stored
        if stored is None or is_quantised(stored) or stored.is_meta or hasattr(stored, "full_tensor"):
            raise ValueError(f"{slug}: {site.name} is quantised, sharded or not there; load the base plain and whole")
        if owners[id(stored)] > 1:
            raise ValueError(f"{slug}: {site.name} is tied to another module, which a residual would change as well")
        if (site.path, site.parameter or "weight") in staying:
            raise ValueError(f"{slug}: {site.name} has a part beside the start that would see another weight")


def _shift(model: nn.Module, part: Part, plain: Part) -> None:
    """Give a part's weight what the plain part lacks, `W - s B0 A0`, in float64 and rounded once."""
    weight = weight_at(model, part.site)
    assert weight.stored is not None
    whole, rest = (copy.deepcopy(one).cpu().double() for one in (part, plain))
    change = whole.dense() - rest.dense()  # type: ignore[operator]
    residual = (weight.matrix().cpu().double() + change).to(weight.stored)
    weight.stored.copy_(weight.layout(weight.replaced(residual)))
