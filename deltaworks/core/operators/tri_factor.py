"""Low rank with a square matrix in the middle: `dW = scale * B N A`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta
from .low_rank import Factored, add_branch, linear_with_branch


class TriFactor(Factored):
    """`dW = scale * (B N A - B0 N0 A0)`.

    Args:
        a: `rank x in`.
        n: `rank x rank`.
        b: `out x rank`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
        a0, b0: a start that is subtracted, N0 within B0; None for none.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")

    def __init__(
        self,
        a: Tensor,
        n: Tensor,
        b: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        a0: Tensor | None = None,
        b0: Tensor | None = None,
    ) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 2 or n.shape != (b.shape[-1], a.shape[0]):
            shapes = f"A {list(a.shape)}, N {list(n.shape)} and B {list(b.shape)}"
            raise ValueError(f"{shapes} do not fit; A is r x in, N is r x r, B is out x r")
        self.a, self.n, self.b = nn.Parameter(a), nn.Parameter(n), nn.Parameter(b)
        self.a0 = None if a0 is None else nn.Parameter(a0, requires_grad=False)
        self.b0 = None if b0 is None else nn.Parameter(b0, requires_grad=False)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.a.shape[0] if self.a0 is None else 2 * self.a.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        # The middle joins the thinner factor, whose product is the smaller.
        inward = self.a.shape[1] < self.b.shape[0]
        a, b = (self.n @ self.a, self.b) if inward else (self.a, self.b @ self.n)
        if self.a0 is None or self.b0 is None:
            return a, b
        return torch.cat([a, self.a0]), torch.cat([b, -self.b0], dim=1)


class Intermediate(Delta):
    """`W' = W + scale * W[:, :r] N W[:r]`: the outer factors are slices of the weight itself, only N is stored.

    Keeps `x W[:r]^T`, `tokens x r`, and nothing as wide as the layer.

    Args:
        n: `rank x rank`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    additive = False
    lean = True

    def __init__(self, n: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if n.dim() != 2 or n.shape[0] != n.shape[1]:
            raise ValueError(f"the middle is r x r, not {list(n.shape)}")
        self.n = nn.Parameter(n)
        self.scale, self.dropout = float(scale), float(dropout)

    def fold(self, weight: Tensor) -> Tensor:
        whole = weight.to(torch.promote_types(weight.dtype, self.n.dtype))
        a, b = self._factors(whole)
        return (whole + self.scale * (b @ a)).to(weight.dtype)

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        r = self.n.shape[0]
        return weight[..., :r, :], weight[..., :r] @ self.n.to(weight.dtype)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return add_branch(self, x, y, *self._factors(weight.matrix()))

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return linear_with_branch(self, x, weight, bias, *self._factors(weight))
