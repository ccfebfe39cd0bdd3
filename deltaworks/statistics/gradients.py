"""Gradients of the base's parameters, taken tensor by tensor while the backward pass runs.

A gradient exists from the moment autograd has it until it has been looked at; the full gradients of a model never stand
side by side. What is accumulated lives on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..model.weights import is_quantised
from .running import Batch, examples, loss_of, untouched


def each_gradient(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], look: Callable[[str, Tensor], None]
) -> int:
    """Back-propagate every batch's loss and show each parameter's gradient to `look(name, gradient)`, then drop it.

    Parameters are visited in the order in which their gradients become complete, once a batch each; a tied parameter
    under the first of its names.

    Args:
        model: run in evaluation mode and left as it was.
        names: parameters by dotted name; no gradient of any other is computed.
        batches: with labels.
        look: sees the gradient, in the parameter's own shape and dtype; must copy what it keeps.

    Returns:
        The number of batches.

    Raises:
        ValueError: when a parameter is quantised, a batch gives no loss, or there is no batch.
    """
    parameters: dict[int, tuple[str, nn.Parameter]] = {}
    for name in names:
        parameter = model.get_parameter(name)
        if is_quantised(parameter) or not parameter.is_floating_point():
            raise ValueError(f"{name} is quantised and has no gradient; load the base unquantised to measure it")
        parameters.setdefault(id(parameter), (name, parameter))
    count, handles = 0, []
    with untouched(model), torch.enable_grad():
        try:
            for name, parameter in parameters.values():

                def taken(p: Tensor, name: str = name) -> None:
                    if p.grad is not None:
                        look(name, p.grad)
                    p.grad = None

                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(taken))
            for batch in batches:
                loss_of(model, batch).backward()
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    if not count:
        raise ValueError("no batch was given, so there is no gradient to measure")
    return count


def mean_gradients(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`(1/N) sum_b g_b`: the mean over batches of each parameter's gradient, on the CPU."""
    return _mean(model, names, batches, lambda gradient: gradient.to("cpu", dtype))


def squared_gradients(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`(1/N) sum_b g_b^2`: the mean over batches of the squared batch gradient, on the CPU."""
    return _mean(model, names, batches, lambda gradient: gradient.to("cpu", dtype).square())


def fisher(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The empirical Fisher information's diagonal, `(1/N) sum_n (d log p(y_n | x_n) / d theta)^2` with true labels.

    One backward pass per example: the square of a batch's mean gradient is a different, much smaller number.
    """
    return squared_gradients(model, names, (one for batch in batches for one in examples(batch)), dtype=dtype)


def _mean(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        value = change(gradient)
        totals[name] = totals[name].add_(value) if name in totals else value.clone()

    count = each_gradient(model, names, batches, add)
    return {name: totals[name].div_(count) for name in names if name in totals}
