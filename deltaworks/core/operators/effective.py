"""A linear layer under its effective weight, keeping little more than the input for backward.

Building `W' = fold(W)` and calling `F.linear` would make autograd keep `W'` and every intermediate of the fold, one
full matrix or more per layer. Here the backward pass folds again, so only `x` and the delta's own tensors stay alive;
and `W'` where building it is costly and `x`, with many tokens, twice as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta, trainable
from .low_rank import base_product, unwrapped
from .products import over_rows
from .saving import save, saved


class Built(Delta):
    """A delta without a cheap side path, whose weight and gradients are had quicker by hand than through autograd.

    `fold` stays the definition, differentiable; these two are the same in fewer passes over the matrix, made in the
    weight's dtype and without a graph.

    Attributes:
        costly: whether building takes a product with matrices as wide as the weight.
        any_order: whether `pulled` is as fast on a gradient that lies column by column.
    """

    costly: ClassVar[bool] = False
    any_order: ClassVar[bool] = False

    def built(self, weight: Tensor) -> Tensor:
        """The changed weight, `out x in`, in `weight`'s dtype; a new tensor."""
        raise NotImplementedError

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the trained parameters, in their order, from that of the changed weight (may be overwritten)."""
        raise NotImplementedError


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
    y: Any = _EffectiveLinear.apply(x, None if bias is None else bias.to(x.dtype), layer, deltas, *trainable(deltas))
    return y


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


def _by_hand(layer: nn.Module, deltas: Sequence[Delta]) -> Built | None:
    """The one delta that acts, where it has gradients of its own."""
    delta = deltas[0]
    if len(deltas) > 1 or not isinstance(delta, Built) or delta.site.rows is not None:
        return None
    return delta if unwrapped(delta) else None


def _fold(layer: nn.Module, deltas: Sequence[Delta]) -> Tensor:
    return folded(layer, "weight", deltas, Weight(layer).matrix())


class _EffectiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Module, deltas: Sequence[Delta], *parameters: Tensor
    ) -> Tensor:
        ctx.layer, ctx.deltas, ctx.parameters = layer, deltas, parameters  # what trains may change before backward
        delta = _by_hand(layer, deltas)
        weight = _fold(layer, deltas) if delta is None else delta.built(Weight(layer).matrix())
        weight, trains = weight.to(x.dtype), any(ctx.needs_input_grad[4:])
        lasts = delta is not None and delta.costly and trains and 2 * weight.numel() <= x.numel()
        save(ctx, x if trains else None, weight if lasts and ctx.needs_input_grad[0] else None)
        return base_product(x, weight, bias)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = saved(ctx)
        g = gradients[0]
        parameters, dbias = ctx.parameters, None
        if ctx.needs_input_grad[1]:
            dbias = g.flatten(0, -2).sum(0)
        delta = _by_hand(ctx.layer, ctx.deltas)
        if delta is not None:
            matrix = Weight(ctx.layer).matrix()
            dx = None
            if ctx.needs_input_grad[0]:
                dx = g @ (delta.built(matrix).to(g.dtype) if weight is None else weight)
            if x is None:
                return dx, dbias, None, None, *(None for _ in parameters)
            change = over_rows(g.flatten(0, -2), x.flatten(0, -2), any_order=delta.any_order)
            return dx, dbias, None, None, *delta.pulled(matrix, change)
        with torch.enable_grad():
            weight = _fold(ctx.layer, ctx.deltas).to(g.dtype)
        dx = g @ weight.detach() if ctx.needs_input_grad[0] else None
        if not parameters:
            return dx, dbias, None, None
        change = over_rows(g.flatten(0, -2), x.flatten(0, -2))
        grads = torch.autograd.grad(weight, parameters, change, allow_unused=True)
        return dx, dbias, None, None, *grads
