"""Low rank on every diagonal block: `dW = scale * blockdiag(B_1 A_1, ..., B_n A_n)`.

The input is cut into n slices and the output into n slices, each pair with factors of its own, so the rank is the sum
of the blocks' at the price of one. All blocks are one batched product; where their ranks differ, the factors are filled
up with zeros for it, which are neither stored nor trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from ...model.weights import Weight
from ..part import Delta
from .low_rank import add_back, base_product, branch_input, dropped, kept, plain
from .saving import save, saved

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

    def stacked(self) -> tuple[Tensor, Tensor]:
        """A (`n x rank x in/n`) and B (`n x out/n x rank`), as one batched product takes them."""
        return self.a, self.b

    def dense(self) -> Tensor:
        return self.scale * torch.block_diag(*(self.b @ self.a))

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return True

    def side(self, x: Tensor) -> Tensor:
        a, b = self.stacked()
        if plain(self, x):
            survive, scale = kept(self, x)
            return _BlockProduct.apply(x, a, b, scale, survive)  # type: ignore[return-value]
        return _product(dropped(self, x), a, b, self.scale)[0]

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if len(self.a) > FEW or not plain(self, x) or weight.dtype != x.dtype:
            return None
        survive, scale = kept(self, x)
        return _BlockLinear.apply(x, weight, bias, self.a, self.b, scale, survive, None)  # type: ignore[return-value]


class UnequalBlocks(BlockLowRank):
    """Low-rank blocks on the diagonal, each of a rank and a scale of its own.

    Args:
        a: the blocks' A one below the other, `sum(ranks) x in/n`.
        b: the blocks' B transposed, one below the other, `sum(ranks) x out/n`.
        ranks: of the n blocks.
        scales: what multiplies their products.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("ranks", "scales", "dropout")

    def __init__(self, a: Tensor, b: Tensor, ranks: list, scales: list, dropout: float = 0.0) -> None:
        Delta.__init__(self)
        ranks, scales = list(ranks), [float(scale) for scale in scales]
        whole = all(type(r) is int and r > 0 for r in ranks)
        if a.dim() != 2 or b.dim() != 2 or not whole or not len(a) == len(b) == sum(ranks):
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise ValueError(f"blocks {shapes} do not have ranks {ranks}; A is sum(ranks) x in/n, B sum(ranks) x out/n")
        if len(scales) != len(ranks):
            raise ValueError(f"{len(scales)} scales are not one for each of {len(ranks)} blocks")
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.ranks, self.scales, self.scale, self.dropout = ranks, scales, 1.0, float(dropout)

    def scaled(self) -> Tensor:
        """`b`, every block's times its scale."""
        return torch.cat([scale * up for scale, up in zip(self.scales, self.b.split(self.ranks), strict=True)])

    def stacked(self) -> tuple[Tensor, Tensor]:
        a, b = (pad_sequence(list(t.split(self.ranks)), batch_first=True) for t in (self.a, self.scaled()))
        return a, b.mT

    def dense(self) -> Tensor:
        downs, ups = _blocks(self.a, self.scaled(), self.ranks)
        return torch.block_diag(*(up @ down for up, down in zip(ups, downs, strict=True)))

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if len(self.ranks) > FEW or not plain(self, x) or weight.dtype != x.dtype:
            return None
        survive, scale = kept(self, x)
        b = self.scaled()
        return _BlockLinear.apply(x, weight, bias, self.a, b, scale, survive, self.ranks)  # type: ignore[return-value]


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
        save(ctx, x, survive, z, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, z, a, b = saved(ctx)
        g = _sliced(gradients[0], len(a))
        gb = (g @ b.to(g.dtype)).mul_(ctx.scale)
        da = (gb.mT @ _sliced(x if survive is None else x * survive, len(a))).to(a.dtype)
        db = (g.mT @ z).mul_(ctx.scale).to(b.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (gb @ a.to(g.dtype)).transpose(0, 1).reshape(x.shape)
            dx = dx if survive is None else dx.mul_(survive)
        return dx, da, db, None, None


def _blocks(a: Tensor, b: Tensor, ranks: list[int] | None) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Every block's A and B."""
    return (a.unbind(), b.unbind()) if ranks is None else (a.split(ranks), [up.T for up in b.split(ranks)])


class _BlockLinear(torch.autograd.Function):
    """`x W^T + bias`, and each block added to its slice of it; W and bias frozen; keeps x and the narrow products.

    Without ranks A and B are those of `BlockLowRank`, with ranks those of `UnequalBlocks`.
    """

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
        ranks: list[int] | None,
    ) -> Tensor:
        ctx.scale, ctx.ranks = scale, ranks
        y, rows = base_product(x, weight, bias)
        downs, ups = _blocks(a.to(x.dtype), b.to(x.dtype), ranks)
        n = len(downs)
        narrow = [part @ down.T for part, down in zip(branch_input(x, survive).chunk(n, 1), downs, strict=True)]
        for part, z, up in zip(rows.chunk(n, 1), narrow, ups, strict=True):
            part.addmm_(z, up.T, alpha=scale)
        save(ctx, x, survive, weight, a, b, *narrow)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, weight, a, b, *narrow = saved(ctx)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        downs, ups = _blocks(a.to(g.dtype), b.to(g.dtype), ctx.ranks)
        n = len(downs)
        slices = g.chunk(n, 1)
        pulled = [part @ up for part, up in zip(slices, ups, strict=True)]
        inputs = branch_input(x, survive).chunk(n, 1)
        das = [gb.T @ part for gb, part in zip(pulled, inputs, strict=True)]
        dbs = [z.T @ part for z, part in zip(narrow, slices, strict=True)]
        da, db = (torch.stack(das), torch.stack(dbs).mT) if ctx.ranks is None else (torch.cat(das), torch.cat(dbs))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            masks = [None] * n if survive is None else survive.view_as(dx).chunk(n, 1)
            for part, gb, down, mask in zip(dx.chunk(n, 1), pulled, downs, masks, strict=True):
                add_back(part, gb, down, ctx.scale, mask)
            dx = dx.view(*gradients[0].shape[:-1], weight.shape[-1])
        return dx, None, None, da.to(a.dtype).mul_(ctx.scale), db.to(b.dtype).mul_(ctx.scale), None, None, None
