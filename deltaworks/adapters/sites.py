"""From names in a file to places in a model, and whether a part fits there. Nothing is allocated, nothing changed."""

from __future__ import annotations

import dataclasses
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.method import weight_at
from ..core.part import Delta, Part, Trained
from ..model.anatomy import Anatomy, Site
from ..model.weights import Weight, is_quantised


def find_site(base: Anatomy, path: str, parameter: str | None, part: str | None) -> Site:
    """The site of this name, from the model's description where it is known there.

    Raises:
        ValueError: when the model has no such module, parameter or part.
    """
    module = module_at(base.model, path)
    here = base.by_path.get(path, [])
    exact = next((site for site in here if (site.parameter, site.part) == (parameter, part)), None)
    if exact is not None:
        return exact
    like = next((site for site in here if site.part == part), None)
    if part is not None and like is None:
        raise ValueError(f"{path} has no part {part!r} in {type(base.model).__name__}")
    if parameter is not None and parameter not in module._parameters:
        raise ValueError(f"{path} ({type(module).__name__}) has no parameter {parameter!r}")
    if like is not None:
        # `called` says how the module's weight is used; it holds for whole-module sites and biases of that module too.
        return dataclasses.replace(like, parameter=parameter)
    return Site(path=path, role=None, kind="other", parameter=parameter)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The base's module of a name.

    Raises:
        ValueError: when there is none.
    """
    if "deltaworks" in path.split("."):
        raise ValueError(f"{path} is not a module of the base")
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {path!r}; is this adapter for another base?") from None


def check_fit(part: Part, site: Site, model: nn.Module) -> None:
    """Whether a part can act at a site: a delta's matrix has the weight's shape, a trained parameter is one.

    Raises:
        ValueError: naming the place, the shape found and the shape needed.
    """
    if isinstance(part, Trained):
        stored = model.get_submodule(site.path)._parameters.get(site.parameter or "weight")
        if stored is None:
            raise ValueError(f"{site.name} is not there to be trained")
        if is_quantised(stored) or not stored.is_floating_point():
            raise ValueError(f"{site.name} is quantised and cannot be replaced; load the base unquantised")
        if part.learned is not None and part.learned.shape != stored.shape:
            raise ValueError(
                f"{site.name} has shape {list(stored.shape)} in the model, {list(part.learned.shape)} in the file"
            )
    elif isinstance(part, Delta):
        if site.parameter is None:
            raise ValueError(f"{type(part).__name__} changes a weight, but no parameter of {site.path} is named")
        weight = weight_at(model, site)
        wanted = tuple(weight.shape)
        found = _shape(part, weight)
        if found != wanted:
            raise ValueError(f"{site.name} has shape {list(wanted)}, the change in the file {list(found)}")


class _Change(nn.Module):
    """A delta's definition as a call, so that its tensors can be swapped for others while it runs."""

    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor | None) -> Tensor:
        return self.delta.dense() if weight is None else self.delta.fold(weight)


def _shape(delta: Delta, place: Weight) -> tuple[int, ...]:
    """The shape a delta's matrix would have, worked out without its values where that is possible."""
    wanted = tuple(place.shape)
    change = _Change(delta)
    unreal = {
        name: torch.empty_like(value, device="meta")
        for name, value in (*change.named_parameters(), *change.named_buffers())
    }
    additive = delta.additive and type(delta).dense is not Delta.dense
    weight = None if additive else torch.empty(wanted, device="meta")
    try:
        with torch.device("meta"), torch.no_grad():
            return tuple(functional_call(change, unreal, (weight,)).shape)
    except Exception as error:
        # Some operations have no rule for shapes alone, some changes need constants from the weight. Then the values
        # decide, if they cannot fill the memory.
        if sum(value.numel() for value in unreal.values()) > 64 * prod(wanted) + (1 << 20):
            raise ValueError(f"{type(delta).__name__} does not fit a weight of shape {list(wanted)}: {error}") from None
    try:
        with torch.no_grad():
            delta.settle(place)
            return tuple(change(None if additive else torch.ones(wanted)).shape)
    except Exception as error:
        raise ValueError(f"{type(delta).__name__} does not fit a weight of shape {list(wanted)}: {error}") from None
