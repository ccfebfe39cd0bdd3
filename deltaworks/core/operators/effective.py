"""A linear layer under its effective weight, keeping only the input for backward.

Building `W' = fold(W)` and calling `F.linear` would make autograd keep `W'` and every intermediate of the fold, one
full matrix or more per layer. Here the backward pass folds again, so only `x` and the delta's own tensors stay alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta, trainable


def effective_linear(x: Tensor, layer: nn.Module, deltas: Sequence[Delta]) -> Tensor:
    """`x W'^T + bias'` for `x` of shape `... x in`, with `W'` the layer's weight under the deltas, in order.

    Gradients reach `x` and the deltas' parameters.
    """
    bias = _fold_bias(layer, deltas)
    view = Weight(layer)
    if view.stored is not None and view.stored.requires_grad and not view.quantised:
        # A weight that trains itself under its deltas: autograd must see the whole fold.
        return nn.functional.linear(x, folded(layer, "weight", deltas, view.canonical(view.stored)).to(x.dtype), bias)
    eager = not (torch.compiler.is_compiling() or x.is_meta or torch.is_autocast_enabled(x.device.type))
    if not eager or not torch.is_grad_enabled():
        return nn.functional.linear(x, _fold(layer, deltas).to(x.dtype), bias)
    y: Any = _EffectiveLinear.apply(x, layer, deltas, *trainable(deltas))
    return y if bias is None else y + bias


def _fold_bias(layer: nn.Module, deltas: Sequence[Delta]) -> Tensor | None:
    bias = layer._parameters.get("bias")
    for delta in deltas:
        if bias is None or type(delta).fold_bias is Delta.fold_bias:
            continue
        part = delta.view(layer, "bias")
        folded = delta.fold_bias(bias if delta.site.rows is None else bias[part.index()])
        bias = bias if folded is None else part.replaced(folded, bias)
    return bias


def folded(layer: nn.Module, parameter: str, deltas: Sequence[Delta], whole: Tensor) -> Tensor:
    """A canonical parameter, starting from the value `whole`, with deltas folded in, one after the other."""
    for delta in deltas:
        if delta.site.rows is None:
            whole = delta.fold(whole)
        else:
            part = delta.view(layer, parameter)
            dim = -2 if whole.dim() > 1 else 0
            whole = part.replaced(delta.fold(whole.index_select(dim, part.index())), whole)
    return whole


def _fold(layer: nn.Module, deltas: Sequence[Delta]) -> Tensor:
    return folded(layer, "weight", deltas, Weight(layer).matrix())


class _EffectiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, deltas: Sequence[Delta], *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.deltas = layer, deltas
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        return nn.functional.linear(x, _fold(layer, deltas).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        g = gradients[0]
        parameters = trainable(ctx.deltas)
        with torch.enable_grad():
            weight = _fold(ctx.layer, ctx.deltas).to(g.dtype)
        dx = g @ weight.detach() if ctx.needs_input_grad[0] else None
        if not parameters:
            return dx, None, None
        change = g.flatten(0, -2).T @ x.flatten(0, -2)
        grads = torch.autograd.grad(weight, parameters, change, allow_unused=True)
        return dx, None, None, *grads
