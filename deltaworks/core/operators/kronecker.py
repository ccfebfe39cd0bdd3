"""Kronecker products: `kron(W1, W2)[i p + k, j q + l] = W1[i, j] W2[k, l]`, applied without being built."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from .low_rank import base_product, plain
from .products import over_batch
from .recompute import recomputed
from .row_dropout import RowDropout
from .saving import save, saved


class Kronecker(RowDropout):
    """`dW = scale kron(W1, W2)`, either factor full or a product of two thin ones.

    On activations: with `X` the input as `i1 x i2`, the output is `W1 X W2^T`. Backward keeps the input alone.

    Args:
        w1: `o1 x i1`, or None with `w1_a` (`o1 x r`) and `w1_b` (`r x i1`).
        w2: `o2 x i2`, or None with `w2_a` (`o2 x r`) and `w2_b` (`r x i2`).
        scale: multiplies the product.
        row_dropout, module_dropout, rescale: see `RowDropout`.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "row_dropout", "module_dropout", "rescale")
    lean = True

    def __init__(
        self,
        w1: Tensor | None = None,
        w2: Tensor | None = None,
        w1_a: Tensor | None = None,
        w1_b: Tensor | None = None,
        w2_a: Tensor | None = None,
        w2_b: Tensor | None = None,
        scale: float = 1.0,
        row_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rescale: bool = True,
    ) -> None:
        super().__init__()
        self.row_dropout, self.module_dropout, self.rescale = row_dropout, module_dropout, rescale
        for name, whole, left, right in (("w1", w1, w1_a, w1_b), ("w2", w2, w2_a, w2_b)):
            if (whole is None) == (left is None or right is None) or (left is None) != (right is None):
                raise ValueError(f"a Kronecker product needs {name} or both {name}_a and {name}_b")
        self.scale = scale
        given = {"w1": w1, "w2": w2, "w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b}
        for name, value in given.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value))

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in self._parameters.values() if tensor is not None]

    def _factors(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """W1 and W2 made of the tensors that `_tensors` lists."""
        names = [name for name, tensor in self._parameters.items() if tensor is not None]
        own = dict(zip(names, tensors, strict=True))
        first = own["w1"] if "w1" in own else own["w1_a"] @ own["w1_b"]
        return first, own["w2"] if "w2" in own else own["w2_a"] @ own["w2_b"]

    def factors(self) -> tuple[Tensor, Tensor]:
        """W1 (`o1 x i1`) and W2 (`o2 x i2`)."""
        return self._factors(*self._tensors())

    def dense(self) -> Tensor:
        first, second = self.factors()
        return self.scale * torch.kron(first.contiguous(), second.contiguous())

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # The weight's way costs the building of it and its gradient, which a frozen base does without.
        first, second = (factor.shape for factor in self.factors())
        passes, spared = (3, tokens) if torch.is_grad_enabled() else (1, 0)
        built = (spared + 256) * weight.fan_in * weight.fan_out
        return self.dropping() or passes * tokens * _cost(first, second) < built

    def side(self, x: Tensor) -> Tensor:
        return self.thinned(recomputed(self._applied, x, *self._tensors()))

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if self.dropping() or not plain(self, x) or weight.dtype != x.dtype:
            return None
        first, second = (factor.to(x.dtype) for factor in self.factors())
        return _KroneckerLinear.apply(x, weight, bias, first, second, self.scale)  # type: ignore[return-value]

    def _applied(self, x: Tensor, *tensors: Tensor) -> Tensor:
        first, second = (factor.to(x.dtype) for factor in self._factors(*tensors))
        blocks = x.unflatten(-1, (first.shape[1], second.shape[1]))
        y = (first @ blocks) @ second.T if _first_first(first.shape, second.shape) else first @ (blocks @ second.T)
        return (y * self.scale if self.scale != 1 else y).flatten(-2)


def _first_first(first: torch.Size, second: torch.Size) -> bool:
    """Whether `(W1 X) W2^T` costs clearly less than `W1 (X W2^T)`, whose backward has a batched product less."""
    (o1, i1), (o2, i2) = first, second
    return 3 * (o1 * i1 * i2 + o1 * i2 * o2) < 2 * (i1 * i2 * o2 + o1 * i1 * o2)


def _cost(first: torch.Size, second: torch.Size) -> int:
    """Products a token, the cheaper way."""
    (o1, i1), (o2, i2) = first, second
    return min(o1 * i1 * i2 + o1 * i2 * o2, i1 * i2 * o2 + o1 * i1 * o2)


class _KroneckerLinear(torch.autograd.Function):
    """`x W^T + bias + scale x kron(W1, W2)^T`, W and bias frozen; keeps x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        save(ctx, x, weight, first, second)
        y, rows = base_product(x, weight, bias)
        half = _halfway(x, first, second)
        if _first_first(first.shape, second.shape):
            rows.view(-1, len(second)).addmm_(half.flatten(0, 1), second.T, alpha=scale)
        else:
            blocks = rows.view(-1, len(first), len(second))
            blocks.baddbmm_(first.expand(len(blocks), -1, -1), half, alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, first, second = saved(ctx)
        (o1, i1), (o2, i2) = first.shape, second.shape
        g = gradients[0].reshape(-1, o1 * o2)
        half = _halfway(x, first, second)
        need_x, need_first, need_second = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5]
        dx = g @ weight if need_x else None
        dfirst = dsecond = None
        if _first_first(first.shape, second.shape):
            pulled = (g.view(-1, o2) @ second).view(-1, o1, i2)
            if need_second:
                dsecond = g.view(-1, o2).T @ half.flatten(0, 1)
            if need_first:
                dfirst = over_batch(pulled, x.reshape(-1, i1, i2))
            if dx is not None:
                dx.view(-1, i1, i2).baddbmm_(first.T.expand(len(dx), -1, -1), pulled, alpha=ctx.scale)
        else:
            blocks = g.view(-1, o1, o2)
            pulled = first.T @ blocks
            if need_second:
                dsecond = pulled.flatten(0, 1).T @ x.reshape(-1, i2)
            if need_first:
                dfirst = over_batch(blocks, half)
            if dx is not None:
                dx.view(-1, i2).addmm_(pulled.flatten(0, 1), second, alpha=ctx.scale)
        for slope in (dfirst, dsecond):
            if slope is not None:
                slope.mul_(ctx.scale)
        return dx if dx is None else dx.view(x.shape), None, None, dfirst, dsecond, None


def _halfway(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`W1 X` or `X W2^T`, whichever comes first, for every row of x: `tokens x . x .`."""
    # Detached, since matmul chooses its kernel by what requires a gradient: frozen must give the same bits.
    blocks, first, second = x.detach().reshape(-1, first.shape[1], second.shape[1]), first.detach(), second.detach()
    if _first_first(first.shape, second.shape):
        return first @ blocks
    return (blocks.flatten(0, 1) @ second.T).view(len(blocks), -1, len(second))
