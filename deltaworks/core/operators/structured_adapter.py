"""An adapter whose one matrix is structured and square: `h + f(M dropout(h)) + bias` after a module."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from ..init import kaiming, normal, zeros
from ..part import Delta, Module
from .bottleneck import ACTIVATIONS
from .kronecker import Kronecker
from .structured_tiles import StructuredTiles

STRUCTURES = ("circulant", "toeplitz", "ldr", "kronecker")


class StructuredAdapter(Module):
    """`h + f(M dropout(h)) + bias`, M circulant, Toeplitz, of low displacement rank, or a Kronecker product.

    M is zero at first: of its two factors one is normal (or Kaiming uniform, of a Kronecker product), the other zero.

    Args:
        width: of h.
        structure: a member of `STRUCTURES`.
        activation: f, a key of `ACTIVATIONS`.
        size: number of pairs (ldr), or side of the Kronecker factors, reduced to a divisor of the width.
        scale: multiplies M.
        dropout: probability of zeroing a feature of h on the added path.
    """

    settings: ClassVar[tuple[str, ...]] = ("width", "structure", "activation", "size", "scale", "dropout")

    def __init__(
        self,
        width: int,
        structure: str = "circulant",
        activation: str = "gelu",
        size: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width, self.structure, self.activation = width, structure, activation
        self.size, self.scale, self.dropout = size, scale, dropout
        self.f = ACTIVATIONS[activation]
        self.matrix: Delta
        if structure == "kronecker":
            side = math.gcd(width, size)
            left, right = zeros(width // side, side), kaiming(side, width // side)
            self.matrix = Kronecker(w1=left, w2=right, scale=scale)
        else:
            shape = (1, 1, size, width)
            self.matrix = StructuredTiles(normal(*shape, std=0.02), zeros(*shape), structure, scale)
        self.bias = nn.Parameter(zeros(width))

    def added(self, y: Tensor, r: Tensor) -> Tensor:
        """`y` and what is made of `r`, both `... x width`."""
        change = self.f(self.matrix.side(nn.functional.dropout(r, self.dropout, self.training)))
        return y + (change + self.bias.to(change.dtype)).to(y.dtype)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.added(y, y)
