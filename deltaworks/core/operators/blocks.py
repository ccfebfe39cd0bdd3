"""Blocks of `r x r`: one pattern repeated along the weight, or one affine map of each of its blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta
from .low_rank import kept


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
        r, m = self.d.shape
        survive, scale = kept(self, x)
        x = x if survive is None else x * survive
        blocks = -(-self.fan_in // r)
        sums = nn.functional.pad(x, (0, blocks * r - self.fan_in)).unflatten(-1, (blocks, r)).sum(-2)
        y = sums @ self.d.to(x.dtype)
        y = y if scale == 1.0 else y * scale
        return y.repeat(*[1] * (y.dim() - 1), self.fan_out // m)


class BlockAffine(Delta):
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
