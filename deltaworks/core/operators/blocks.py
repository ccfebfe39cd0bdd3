"""Blocks of `r x r`: one pattern repeated along the weight, or one affine map of each of its blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta
from .effective import Built
from .low_rank import base_product, branch_input, kept, plain


class Tiled(Delta):
    """`dW[o, j] = D[j mod r, o mod m]`: a pattern of r input columns, repeated to the weight's size.

    The product adds up the input features that are r apart and multiplies the sums by D, so autograd keeps the sums,
    `tokens x r`, and nothing as wide as the input.

    Args:
        d: D, `r x m`, with m a divisor of `fan_out`.
        fan_out, fan_in: size of the weight.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in", "dropout")
    lean = True
    scale = 1.0

    def __init__(self, d: Tensor, fan_out: int, fan_in: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d.dim() != 2 or fan_out % d.shape[1]:
            raise ValueError(f"a pattern {list(d.shape)} does not tile {fan_out} outputs; it is r x m with m a divisor")
        self.d = nn.Parameter(d)
        self.fan_out, self.fan_in, self.dropout = fan_out, fan_in, float(dropout)

    def dense(self) -> Tensor:
        r, m = self.d.shape
        return self.d.T.repeat(self.fan_out // m, -(-self.fan_in // r))[:, : self.fan_in]

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return True

    def side(self, x: Tensor) -> Tensor:
        survive, scale = kept(self, x)
        sums = _sums(x if survive is None else x * survive, len(self.d))
        y = (sums if scale == 1.0 else sums * scale) @ self.d.to(x.dtype)
        repeats = self.fan_out // self.d.shape[1]
        return y if repeats == 1 else y.repeat(*[1] * (y.dim() - 1), repeats)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not plain(self, x) or weight.dtype != x.dtype:
            return None
        survive, scale = kept(self, x)
        return _TiledLinear.apply(x, weight, bias, self.d, scale, survive)  # type: ignore[return-value]


def _sums(x: Tensor, r: int) -> Tensor:
    """Input features that are r apart, added up: `... x r`."""
    missing = -x.shape[-1] % r
    x = nn.functional.pad(x, (0, missing)) if missing else x
    return x.unflatten(-1, (-1, r)).sum(-2)


class _TiledLinear(torch.autograd.Function):
    """`x W^T + bias + scale (sums of kept x) [D D ... D]`, W and bias frozen; keeps the sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float, survive: Tensor | None
    ) -> Tensor:
        sums = _sums(branch_input(x, survive), len(d))
        y, rows = base_product(x, weight, bias)
        if rows.shape[-1] == d.shape[1]:
            rows.addmm_(sums, d.to(x.dtype), alpha=scale)
        else:
            rows.unflatten(-1, (-1, d.shape[1])).add_((sums @ d.to(x.dtype)).unsqueeze(1), alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(sums, weight, d, survive if ctx.needs_input_grad[0] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        sums, weight, d, survive = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        tiled = g if g.shape[-1] == d.shape[1] else g.unflatten(-1, (-1, d.shape[1])).sum(1)
        dd = (sums.T @ tiled).mul_(ctx.scale).to(d.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None, dd, None, None
        dx = g @ weight
        branch = (tiled @ d.to(g.dtype).T).mul_(ctx.scale)
        r, whole = len(d), dx.shape[-1] - dx.shape[-1] % len(d)
        if survive is not None:
            dx.addcmul_(branch.repeat(1, -(-dx.shape[-1] // r))[:, : dx.shape[-1]], survive.view_as(dx).to(g.dtype))
        else:
            dx[:, :whole].unflatten(-1, (-1, r)).add_(branch.unsqueeze(1))
            dx[:, whole:].add_(branch[:, : dx.shape[-1] - whole])
        return dx.view(*gradients[0].shape[:-1], -1), None, None, dd, None, None


class BlockAffine(Built):
    """`W'[i, j] = W[i, j] + W[i, j] D + D` for every `r x r` block of W, with D one matrix a row or column of blocks.

    Args:
        d: `groups x r x r`; `out/r` groups when shared along the input, `in/r` when shared along the output.
        along: `in` or `out`, the direction in which one D is shared.
    """

    settings: ClassVar[tuple[str, ...]] = ("along",)
    additive = False

    def __init__(self, d: Tensor, along: str = "in") -> None:
        super().__init__()
        if d.dim() != 3 or d.shape[1] != d.shape[2] or along not in ("in", "out"):
            raise ValueError(f"D {list(d.shape)} along {along!r}: it must be groups x r x r, along in or out")
        self.d, self.along = nn.Parameter(d), along

    def fold(self, weight: Tensor) -> Tensor:
        r = self.d.shape[-1]
        whole = weight.to(torch.promote_types(weight.dtype, self.d.dtype))
        blocks = whole.unflatten(-1, (-1, r)).unflatten(0, (-1, r))  # i a j b
        if self.along == "in":
            change = torch.einsum("iajb,ibc->iajc", blocks, self.d) + self.d.unsqueeze(2)
        else:
            change = torch.einsum("iajb,jbc->iajc", blocks, self.d) + self.d.transpose(0, 1)
        return (blocks + change).reshape(weight.shape).to(weight.dtype)

    def built(self, weight: Tensor) -> Tensor:
        d, r = self.d.detach().to(weight.dtype), self.d.shape[-1]
        if self.along == "in":
            # Of a row of blocks, all rows of all blocks are one matrix on which its D acts from the right.
            rows = weight.reshape(len(d), -1, r)
            made = torch.baddbmm(rows, rows, d).view(len(d), r, -1, r).add_(d.unsqueeze(2))
        else:
            columns = weight.unflatten(-1, (-1, r)).transpose(0, 1)
            made = torch.baddbmm(columns, columns, d).transpose(0, 1).contiguous()
            made.view(-1, r, len(d), r).add_(d.transpose(0, 1))
        return made.view(weight.shape)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        groups, r, _ = self.d.shape
        if self.along == "in":
            product = torch.bmm(weight.reshape(groups, -1, r).mT, change.view(groups, -1, r))
            plain = change.view(groups, r, -1, r).sum(2)
        else:
            columns = weight.unflatten(-1, (-1, r)).transpose(0, 1)
            product = torch.bmm(columns.mT, change.unflatten(-1, (-1, r)).transpose(0, 1))
            plain = change.view(-1, r, groups, r).sum(0).transpose(0, 1)
        return ((product + plain).to(self.d.dtype),)
