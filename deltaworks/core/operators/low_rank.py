"""The low-rank operator: `dW = scale * B A`, the form most weight deltas share.

`A` is `rank x in`, `B` is `out x rank`. The product `B A` is never formed in training. One autograd function computes
the base product and the branch, adds in place, and keeps `x` (only if A trains) and `x A^T` (only if B trains).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta


class LowRank(Delta):
    """`dW = scale * (B A - B0 A0)`.

    `b0`, `a0` are frozen and present only for methods that start from part of the weight itself (PiSSA, OLoRA,
    LoRA-GA): instead of moving the base to a residual, the start is subtracted. The base stays untouched, so detaching,
    stacking, switching and quantised bases need nothing special, and the result is an ordinary LoRA of rank `2 r`.

    Args:
        a: `rank x in`.
        b: `out x rank`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
        a0, b0: the start that is subtracted, shapes of `a` and `b`.
        train_a, train_b: whether a factor receives gradients.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout", "train_a", "train_b")
    lean = True

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        a0: Tensor | None = None,
        b0: Tensor | None = None,
        train_a: bool = True,
        train_b: bool = True,
    ) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"factors A {list(a.shape)} and B {list(b.shape)} do not have one rank; A is r x in, B out x r")
        self.a = nn.Parameter(a, requires_grad=train_a)
        self.b = nn.Parameter(b, requires_grad=train_b)
        self.scale, self.dropout, self.train_a, self.train_b = float(scale), float(dropout), train_a, train_b
        self.a0 = None if a0 is None else nn.Parameter(a0, requires_grad=False)
        self.b0 = None if b0 is None else nn.Parameter(b0, requires_grad=False)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def dense(self) -> Tensor:
        change = self.b @ self.a
        if self.a0 is not None and self.b0 is not None:
            change = change - self.b0 @ self.a0
        return self.scale * change

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # Building costs r*out*in products plus writing out*in; the branch costs r*(out+in) per token.
        return tokens * (weight.fan_in + weight.fan_out) < 2 * weight.fan_in * weight.fan_out or self.rank * 4 < min(
            weight.fan_in, weight.fan_out
        )

    def side(self, x: Tensor) -> Tensor:
        x = self._dropped(x)
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        u = (x @ a.T) @ b.T
        if self.a0 is not None and self.b0 is not None:
            u = u - (x @ self.a0.to(x.dtype).T) @ self.b0.to(x.dtype).T
        return u * self.scale if self.scale != 1.0 else u

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        if self._plain(x):
            a, b = self._factors()
            return _LowRankAdd.apply(self._dropped(x), y, a, b, self.scale)  # type: ignore[return-value]
        return y + self.side(x).to(y.dtype)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if (self.dropout and self.training) or not self._plain(x) or weight.dtype != x.dtype:
            return None
        a, b = self._factors()
        return _LowRankLinear.apply(x, weight, bias, a, b, self.scale)  # type: ignore[return-value]

    def look_up(self, tokens: Tensor, layer: nn.Embedding) -> Tensor:
        """The change of an embedding's output, for token ids."""
        change = nn.functional.embedding(tokens, self.a.T, layer.padding_idx) @ self.b.T
        if self.a0 is not None and self.b0 is not None:
            change = change - nn.functional.embedding(tokens, self.a0.T) @ self.b0.T
        return self.scale * change

    def convolve(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The change of a convolution's output: a convolution to `rank` channels, then a pointwise one."""
        x = self._dropped(x)
        a, b = self._factors()
        kernel = a.to(x.dtype).unflatten(1, layer.weight.shape[1:])  # type: ignore[union-attr]
        functional = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[kernel.dim() - 2]
        if layer.groups != 1 or layer.padding_mode != "zeros":  # type: ignore[union-attr]
            return _by_weight(self, x, layer)
        z = functional(x, kernel, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[union-attr]
        return self.scale * functional(z, b.to(x.dtype).reshape(*b.shape, *[1] * (kernel.dim() - 2)))

    def _factors(self) -> tuple[Tensor, Tensor]:
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return torch.cat([self.a, self.a0]), torch.cat([self.b, -self.b0], dim=1)

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.dropout and self.training else x

    def _plain(self, x: Tensor) -> bool:
        """Whether the hand-written functions apply: eager, no autocast, no tensor subclass."""
        return (
            not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
            and type(self.a) is nn.Parameter
            and type(x) in (Tensor, nn.Parameter)
        )


def _by_weight(delta: Delta, x: Tensor, layer: Any) -> Tensor:
    kernel = delta.dense().to(x.dtype).unflatten(1, layer.weight.shape[1:])
    return layer._conv_forward(x, kernel, None)


def _branch_gradients(ctx: Any, g: Tensor, x: Tensor | None, z: Tensor | None, a: Tensor, b: Tensor, need: tuple) -> tuple:
    """Gradients of the branch: (g B scale, dA, dB), each only if needed."""
    need_x, need_a, need_b = need
    gb = (g @ b.to(g.dtype)).mul_(ctx.scale) if need_x or need_a else None
    da = (gb.T @ x).to(a.dtype) if need_a and gb is not None and x is not None else None
    db = (g.T @ z).mul_(ctx.scale).to(b.dtype) if need_b and z is not None else None
    return gb, da, db


class _LowRankLinear(torch.autograd.Function):
    """`y = x W^T + bias + scale (x A^T) B^T` with W and bias frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        z = flat @ a.to(x.dtype).T
        y = nn.functional.linear(flat, weight, bias)
        y.addmm_(z, b.to(x.dtype).T, alpha=scale)
        ctx.scale = scale
        need_a, need_b = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        ctx.save_for_backward(x if need_a else None, z if need_b else None, weight, a, b)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, z, weight, a, b = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1]) if x is not None else None
        gb, da, db = _branch_gradients(ctx, g, flat, z, a, b, (need_x, need_a, need_b))
        dx = None
        if need_x and gb is not None:
            dx = (g @ weight).addmm_(gb, a.to(g.dtype)).view(*gradients[0].shape[:-1], weight.shape[-1])
        return dx, None, None, da, db, None


class _LowRankAdd(torch.autograd.Function):
    """`y += scale (x A^T) B^T`, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        z = flat @ a.to(x.dtype).T
        out = y.view(-1, y.shape[-1]) if y.is_contiguous() else None
        if out is None or y.dtype != x.dtype:
            raise ValueError(f"the base gave {y.dtype} for {x.dtype} activations; low-rank products need one dtype")
        out.addmm_(z, b.to(x.dtype).T, alpha=scale)
        ctx.mark_dirty(y)
        ctx.scale = scale
        need_a, need_b = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if need_a else None, z if need_b else None, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, z, a, b = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        need_x, _, need_a, need_b, _ = ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1]) if x is not None else None
        gb, da, db = _branch_gradients(ctx, g, flat, z, a, b, (need_x, need_a, need_b))
        dx = (gb @ a.to(g.dtype)).view(*gradients[0].shape[:-1], a.shape[-1]) if need_x and gb is not None else None
        return dx, gradients[0], da, db, None
