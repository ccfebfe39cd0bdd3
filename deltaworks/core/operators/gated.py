"""Low rank behind a gate: `dW = scale * sigmoid(theta) * B A`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .low_rank import Factored


class Gated(Factored):
    """`dW = scale * sigmoid(theta) * B A`.

    Args:
        a: `rank x in`.
        b: `out x rank`.
        theta: one value, of the gate.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")

    def __init__(self, a: Tensor, b: Tensor, theta: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or theta.shape != (1,):
            shapes = f"A {list(a.shape)}, B {list(b.shape)} and theta {list(theta.shape)}"
            raise ValueError(f"{shapes} do not fit; A is r x in, B out x r, theta one value")
        self.a, self.b, self.theta = nn.Parameter(a), nn.Parameter(b), nn.Parameter(theta)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b * torch.sigmoid(self.theta)
