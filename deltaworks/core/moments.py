"""A parameter changes and its optimizer state goes with it.

Methods grow, shrink, exchange and restart parts of what they train. The tensor object stays the same, so optimizers,
schedulers and trainers go on holding it; what the optimizer remembers of each entry (moments, momentum, ...) is taken
along: entries that survive keep theirs, new ones begin at zero. State that has no entry for entry meaning, such as that
of a quantised optimizer, cannot follow and is begun anew, with a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .tuned import Tuned

Change = Callable[[Tensor], Tensor]


def unwrapped(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer within what accelerate and others wrap around it; None for None."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def moments(parameter: Tensor, optimizer: Any) -> dict[str, Tensor]:
    """What an optimizer remembers of a parameter, entry by entry or row by row; by name, the tensors themselves.

    Counts of steps and the like are left out. A tensor that has one entry where the parameter has many (Adafactor's row
    and column variances) belongs to all of them.
    """
    inner = unwrapped(optimizer)
    held = inner.state.get(parameter, {}) if inner is not None else {}
    return {name: value for name, value in held.items() if _follows(value, parameter)}


def _follows(value: Any, parameter: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() == parameter.dim() > 0
        and all(own in (1, size) for own, size in zip(value.shape, parameter.shape, strict=True))
    )


@torch.no_grad()
def keep(parameter: nn.Parameter, chosen: Tensor, dim: int, optimizer: Any = None) -> None:
    """Keep some slices of a parameter, in a given order, each with its state; the others go.

    Args:
        parameter: of any shape; its object stays, its gradient goes.
        chosen: indices along `dim`; or, for a stack that keeps different slices in each member, indices of the shape
            `leading axes x kept`, where the leading axes are the parameter's first ones.
        dim: along which slices are taken, as `torch.index_select` counts.
        optimizer: that may remember the parameter, wrapped or not.
    """
    dim %= parameter.dim()
    whole = parameter.shape

    def change(value: Tensor) -> Tensor:
        if value.shape[dim] != whole[dim]:
            return value
        index = chosen.to(value.device)
        if index.dim() == 1:
            return value.index_select(dim, index)
        lead = index.dim() - 1
        shape = [1] * value.dim()
        shape[:lead], shape[dim] = index.shape[:-1], index.shape[-1]
        return value.take_along_dim(index.reshape(shape), dim)

    _changed(parameter, change, change, optimizer)


def cut(parameter: nn.Parameter, number: int, dim: int, optimizer: Any = None) -> None:
    """Leave the first slices of a parameter, each with its state; nothing happens to one that has no more.

    Args:
        parameter: of any shape; its object stays.
        number: of slices that are left.
        dim: along which they are taken.
        optimizer: that may remember the parameter, wrapped or not.
    """
    if parameter.shape[dim] > number:
        keep(parameter, torch.arange(number), dim, optimizer)


@torch.no_grad()
def grow(parameter: nn.Parameter, new: Tensor, dim: int, optimizer: Any = None, at: int | None = None) -> None:
    """Add slices to a parameter; the old ones keep their state, that of the new ones is zero.

    Args:
        parameter: of any shape; its object stays, its gradient goes.
        new: the slices, as wide as the parameter in every other dimension.
        dim: along which they are added.
        optimizer: that may remember the parameter, wrapped or not.
        at: index before which they are put; None for the end.
    """
    dim %= parameter.dim()
    size = parameter.shape[dim]
    first = size if at is None else at

    def joined(value: Tensor, more: Tensor) -> Tensor:
        return torch.cat([value.narrow(dim, 0, first), more, value.narrow(dim, first, size - first)], dim)

    def remembered(value: Tensor) -> Tensor:
        if value.shape[dim] != size:
            return value
        shape = list(value.shape)
        shape[dim] = new.shape[dim]
        return joined(value, value.new_zeros(shape))

    _changed(parameter, lambda value: joined(value, new.to(value)), remembered, optimizer)


@torch.no_grad()
def restart(parameter: nn.Parameter, optimizer: Any = None, at: Any = None) -> None:
    """Forget what an optimizer remembers of a parameter.

    Args:
        parameter: whose value stays; the gradient goes with the state of the whole.
        optimizer: that may remember it, wrapped or not.
        at: index of some entries, whose moments become zero while the count of steps goes on; None for everything.
    """
    if at is None:
        parameter.grad = None
        inner = unwrapped(optimizer)
        if inner is not None:
            inner.state.pop(parameter, None)
        return
    for value in moments(parameter, optimizer).values():
        if value.shape == parameter.shape:
            value[at] = 0


def _changed(parameter: nn.Parameter, change: Change, remembered: Change, optimizer: Any) -> None:
    inner = unwrapped(optimizer)
    held = inner.state.get(parameter) if inner is not None else None
    if held:
        following = moments(parameter, inner)
        lost = [name for name, value in held.items() if isinstance(value, Tensor) and value.numel() > 1]
        lost = [name for name in lost if name not in following]
        if lost and inner is not None:
            warnings.warn(
                f"{type(inner).__name__} keeps {lost[0]} in a form that cannot follow a parameter of another size; "
                "its state begins anew",
                stacklevel=4,
            )
            inner.state.pop(parameter)
        else:
            held.update({name: remembered(value).contiguous() for name, value in following.items()})
    replace_value(parameter, change(parameter.data).contiguous())


def replace_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter a value of another shape; the object stays, its gradient goes.

    A graph that is still alive, such as that of a loss somebody keeps, holds the node that accumulates the parameter's
    gradient in its old shape, and the next graph would take the same node. A change of dtype makes torch let go of it.
    """
    parameter.grad = None
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = value.to(parameter.device)


def regroup(tuned: Tuned, optimizer: Any) -> None:
    """Let an optimizer hold exactly what an adapter trains now, in the order in which a new optimizer would.

    Parameters that stay keep their state, those that are gone lose it, new ones begin without. The groups, and with
    them what a scheduler knows of them, stay.

    Raises:
        ValueError: when the adapter now needs a group with settings that the optimizer has none for.
    """
    inner = unwrapped(optimizer)
    if inner is None:
        return
    theirs = {id(parameter) for parameter in tuned.parameters()}
    wanted = tuned.parameter_groups(1.0)
    old = [group for group in inner.param_groups if "names" in group] or inner.param_groups
    known = {str(sorted(group["own"].items())): group for group in old if "own" in group}
    mine: list[Any] = [known.get(str(sorted(new["own"].items()))) for new in wanted] if known else old
    if len(wanted) > len(mine) or any(group is None for group in mine):
        raise ValueError(
            f"{tuned.method.slug} now trains in {len(wanted)} groups of different rates, the optimizer has "
            f"{len(old)}, not all the same; make it from tuned.parameter_groups(...)"
        )
    gone = [parameter for group in old for parameter in group["params"] if id(parameter) not in theirs]
    for group in old:
        group["params"] = []
        if "names" in group:
            group["names"] = []
    for group, new in zip(mine, wanted, strict=False):
        group["params"] = new["params"]
        if "names" in group:
            group["names"] = new["names"]
    for parameter in gone:
        inner.state.pop(parameter, None)


def younger(parameter: Tensor, optimizer: Any, age: int) -> float:
    """How an Adam that began `age` steps ago would correct the bias of its moments, over how the optimizer does.

    New entries of an old tensor share its count of steps, so their moments, which began at zero, count as complete.
    Their move times this number is the one that a fresh count would give (up to Adam's epsilon).

    Args:
        parameter: the tensor, which the optimizer has just stepped.
        optimizer: wrapped or not; 1 for any that does not correct by a count.
        age: steps since the entries began, this one included.
    """
    inner = unwrapped(optimizer)
    held = inner.state.get(parameter, {}) if inner is not None else {}
    if inner is None or "exp_avg_sq" not in held or "step" not in held:
        return 1.0
    group = next(group for group in inner.param_groups if any(p is parameter for p in group["params"]))
    if "betas" not in group:
        return 1.0
    first, second = group["betas"]

    def factor(steps: float) -> float:
        return math.sqrt(1 - second**steps) / (1 - first**steps)

    return factor(age) / factor(float(held["step"]))


def refuse_sharing(slug: str) -> None:
    """For methods whose tensors change their size in training.

    Raises:
        ValueError: where several processes train together, whose gradients are exchanged in buffers of fixed size.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        number = torch.distributed.get_world_size()
        if number > 1:
            raise ValueError(
                f"{slug} changes the size of its tensors while it trains, which {number} processes that share "
                "gradients cannot follow; train in one process"
            )
