"""Running a model without leaving a trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]


@contextlib.contextmanager
def untouched(model: nn.Module, *, train: bool = False, seed: int = 0) -> Iterator[nn.Module]:
    """Within the block the model may be run, differentiated and switched; afterwards it is as before.

    Restores training mode of every module, `requires_grad` and `.grad` of every parameter, every buffer, and the random
    state of CPU and the model's device. Values of parameters are the caller's business.

    Args:
        model: the model; its gradients are put aside, all its parameters are frozen at first.
        train: run it in training mode (dropout acts); else in evaluation mode.
        seed: seeds dropout, so that the same measurement gives the same numbers.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if train else []
    devices = {parameter.device for parameter, _, _ in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
        torch.manual_seed(seed)
        try:
            model.train(train)
            for parameter, _, _ in flags:
                parameter.grad = None
                parameter.requires_grad_(False)
            yield model
        finally:
            for parameter, needed, gradient in flags:
                parameter.requires_grad_(needed)
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                buffer.data.copy_(value)


def moved(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss the model computes for a batch.

    Raises:
        ValueError: when it computes none.
    """
    result = model(**moved(batch, model))
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} computes no loss for a batch with {', '.join(batch)}; "
            "measurements of gradients need batches with labels"
        )
    return loss


def examples(batch: Batch) -> Iterator[dict[str, Any]]:
    """The examples of a batch, each as a batch of one.

    The number of examples is the first dimension of the batch's first tensor; every tensor as long is divided, the rest
    goes along whole.
    """
    count = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)
    for i in range(count):
        yield {
            name: value[i : i + 1] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
            for name, value in batch.items()
        }
