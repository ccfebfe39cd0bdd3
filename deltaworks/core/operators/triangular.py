"""Low rank with two triangles in the middle, which grow strip by strip: `dW = scale * B (L + U) A`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .low_rank import Factored


def widths(rank: int, first: int, block: int) -> list[int]:
    """Sizes of the blocks that a rank is made of: `first`, then `block` each; the last may be smaller."""
    rest = rank - first
    return [first, *[min(block, rest - start) for start in range(0, rest, block)]]


class Triangular(Factored):
    """`dW = alpha / (r + 1e-5) * B (L + U) A`, block-triangular L and U, both with the blocks of the diagonal.

    Block i, which makes the rank r_i, owns a strip of rows of L, `width x r_i`, and one of columns of U, `r_i x width`.

    Args:
        a: `r x in`.
        b: `out x r`.
        lower: the strips of L one after the other, each row by row.
        upper: the strips of U one after the other, each row by row.
        alpha: numerator of the scale.
        reference: divisor of the scale; None for the rank.
        first: width of the first block.
        block: width of the others.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("alpha", "reference", "first", "block", "dropout")

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        lower: Tensor,
        upper: Tensor,
        alpha: float,
        reference: int | None,
        first: int,
        block: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper)
        self.alpha, self.reference, self.dropout = float(alpha), reference, float(dropout)
        self.first, self.block = first, block
        size = sum(r * w for r, w in self._blocks()) if a.dim() == 2 and a.shape[0] >= first > 0 < block else -1
        if b.dim() != 2 or b.shape[1] != a.shape[0] or lower.shape != (size,) or upper.shape != (size,):
            shapes = f"A {list(a.shape)}, B {list(b.shape)} and strips of {len(lower)} and {len(upper)} values"
            raise ValueError(f"{shapes} do not fit; A is r x in, B out x r, the strips as blocks {first}, {block} say")

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.alpha / ((self.reference or self.rank) + 1e-5)

    def _blocks(self) -> list[tuple[int, int]]:
        """Rank so far and width of every block."""
        pairs, rank = [], 0
        for width in widths(self.rank, self.first, self.block):
            rank += width
            pairs.append((rank, width))
        return pairs

    def core(self) -> Tensor:
        """L + U, `r x r`."""
        blocks, pad = self._blocks(), nn.functional.pad
        sizes, whole = [rank * width for rank, width in blocks], self.rank
        rows = [
            pad(strip.unflatten(0, (width, rank)), (0, whole - rank))
            for strip, (rank, width) in zip(self.lower.split(sizes), blocks, strict=True)
        ]
        columns = [
            pad(strip.unflatten(0, (rank, width)), (0, 0, 0, whole - rank))
            for strip, (rank, width) in zip(self.upper.split(sizes), blocks, strict=True)
        ]
        return torch.cat(rows) + torch.cat(columns, dim=1)

    def factors(self) -> tuple[Tensor, Tensor]:
        # The middle joins the thinner factor, whose product is the smaller.
        core = self.core()
        return (core @ self.a, self.b) if self.a.shape[1] < self.b.shape[0] else (self.a, self.b @ core)
