"""Low rank on every diagonal block: `dW = scale * blockdiag(B_1 A_1, ..., B_n A_n)`.

The input is cut into n slices and the output into n slices, each pair with factors of its own, so the rank is the sum
of the blocks' at the price of one. All blocks are one batched product.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta
from .low_rank import add_back, base_product, branch_input, dropped, kept, plain

FEW = 8
"""Blocks up to which one product each is quicker than a batched one, which cannot add to the base's."""


class BlockLowRank(Delta):
    """Low-rank blocks on the diagonal.

    Args:
        a: `n x rank x in/n`.
        b: `n x out/n x rank`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    lean = True

    def __init__(self, a: Tensor, b: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if a.dim() != 3 or b.dim() != 3 or (a.shape[0], a.shape[1]) != (b.shape[0], b.shape[2]):
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise ValueError(f"blocks {shapes} do not fit; A is n x r x in/n, B is n x out/n x r")
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = float(scale), float(dropout)

    def dense(self) -> Tensor:
        return self.scale * torch.block_diag(*(self.b @ self.a))

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return True

    def side(self, x: Tensor) -> Tensor:
        if plain(self, x):
            survive, scale = kept(self, x)
            return _BlockProduct.apply(x, self.a, self.b, scale, survive)  # type: ignore[return-value]
        return _product(dropped(self, x), self.a, self.b, self.scale)[0]

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if len(self.a) > FEW or not plain(self, x) or weight.dtype != x.dtype:
            return None
        survive, scale = kept(self, x)
        return _BlockLinear.apply(x, weight, bias, self.a, self.b, scale, survive)  # type: ignore[return-value]


def _sliced(x: Tensor, n: int) -> Tensor:
    """`n x tokens x width/n`."""
    return x.reshape(-1, n, x.shape[-1] // n).transpose(0, 1)


def _product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    z = _sliced(x, len(a)) @ a.to(x.dtype).mT
    y = (z @ b.to(x.dtype).mT) * scale
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1), z


class _BlockProduct(torch.autograd.Function):
    """`(kept x) dW^T`; keeps x and the narrow product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, survive: Tensor | None) -> Tensor:
        y, z = _product(x if survive is None else x * survive, a, b, scale)
        ctx.scale = scale
        ctx.save_for_backward(x, survive, z, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, z, a, b = ctx.saved_tensors
        g = _sliced(gradients[0], len(a))
        gb = (g @ b.to(g.dtype)).mul_(ctx.scale)
        da = (gb.mT @ _sliced(x if survive is None else x * survive, len(a))).to(a.dtype)
        db = (g.mT @ z).mul_(ctx.scale).to(b.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (gb @ a.to(g.dtype)).transpose(0, 1).reshape(x.shape)
            dx = dx if survive is None else dx.mul_(survive)
        return dx, da, db, None, None


class _BlockLinear(torch.autograd.Function):
    """`x W^T + bias`, and each block added to its slice of it; W and bias frozen; keeps x and the narrow products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        survive: Tensor | None,
    ) -> Tensor:
        ctx.scale = scale
        y, rows = base_product(x, weight, bias)
        n = len(a)
        narrow = [part @ down.T for part, down in zip(branch_input(x, survive).chunk(n, 1), a.to(x.dtype), strict=True)]
        for part, z, up in zip(rows.chunk(n, 1), narrow, b.to(x.dtype), strict=True):
            part.addmm_(z, up.T, alpha=scale)
        ctx.save_for_backward(x, survive, weight, a, b, *narrow)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, weight, a, b, *narrow = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        n = len(a)
        slices = g.chunk(n, 1)
        pulled = [part @ up for part, up in zip(slices, b.to(g.dtype), strict=True)]
        inputs = branch_input(x, survive).chunk(n, 1)
        da = torch.stack([gb.T @ part for gb, part in zip(pulled, inputs, strict=True)])
        db = torch.stack([z.T @ part for z, part in zip(narrow, slices, strict=True)]).mT
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            masks = [None] * n if survive is None else survive.view_as(dx).chunk(n, 1)
            for part, gb, down, mask in zip(dx.chunk(n, 1), pulled, a.to(g.dtype), masks, strict=True):
                add_back(part, gb, down, ctx.scale, mask)
            dx = dx.view(*gradients[0].shape[:-1], weight.shape[-1])
        return dx, None, None, da.to(a.dtype).mul_(ctx.scale), db.to(b.dtype).mul_(ctx.scale), None, None
