"""Tiles of structured matrices under one factor that trains."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .low_rank import dropped
from .recompute import recomputed
from .structured_tiles import StructuredTiles


class ScaledTiles(StructuredTiles):
    """`s` times the tiles, which is the tiles of `a` and `s b`.

    Args:
        s: the factor, one value.
        a, b, structure, dropout: see `StructuredTiles`.
    """

    settings: ClassVar[tuple[str, ...]] = ("structure", "dropout")

    def __init__(self, a: Tensor, b: Tensor, s: Tensor, structure: str, dropout: float = 0.0) -> None:
        if s.shape != (1,):
            raise ValueError(f"the factor of tiles is one value, not {list(s.shape)}")
        super().__init__(a, b, structure, dropout=dropout)
        self.s = nn.Parameter(s)

    def dense(self) -> Tensor:
        width = self.a.shape[1] * self.a.shape[3]
        return self._applied(torch.eye(width, dtype=self.a.dtype, device=self.a.device), self.a, self.s * self.b).mT

    def built(self, weight: Tensor) -> Tensor:
        return self.fold(weight)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            made = self.dense()
        return torch.autograd.grad(made, (self.a, self.b, self.s), change.to(made.dtype))

    def side(self, x: Tensor) -> Tensor:
        return recomputed(self._scaled, dropped(self, x), self.a, self.b, self.s)

    def _scaled(self, x: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return self._applied(x, a, s * b)
