"""An expression that keeps its arguments for backward and nothing it computes on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .saving import save, saved


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, computed a second time when gradients are asked for.

    For cheap elementwise expressions of wide activations: `function` must be deterministic and use nothing else that
    needs a gradient.
    """
    if torch.compiler.is_compiling():
        return function(*tensors)
    return _Recomputed.apply(function, *tensors)  # type: ignore[return-value]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        device = tensors[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        save(ctx, *tensors)
        # Detached, since matmul chooses its kernel by what requires a gradient: frozen must give the same bits.
        return function(*(tensor.detach() for tensor in tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        wanted = ctx.needs_input_grad[1:]
        device, dtype, enabled = ctx.autocast  # a backward pass runs outside the context that the forward ran in
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            tensors = [t.detach().requires_grad_(need) for t, need in zip(saved(ctx), wanted, strict=True)]
            result = ctx.function(*tensors)
        given = iter(torch.autograd.grad(result, [t for t in tensors if t.requires_grad], gradients[0]))
        return None, *(next(given) if need else None for need in wanted)
