"""Low rank beside a matrix that what it has left behind adds up in: `dW = shift + scale * B A`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ...model.weights import Weight
from .low_rank import Factored, convolved, linear_with_branch


class Shifted(Factored):
    """`dW = shift + scale * B A`; the shift is a constant of autograd and moved by a rule.

    Args:
        a: `rank x in`.
        b: `out x rank`.
        shift: `out x in`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training; the shift sees all.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")

    def __init__(self, a: Tensor, b: Tensor, shift: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if a.dim() != 2 or a.shape[0] != b.shape[-1] or shift.shape != (b.shape[0], a.shape[1]):
            shapes = f"A {list(a.shape)}, B {list(b.shape)} and shift {list(shift.shape)}"
            raise ValueError(f"{shapes} do not fit; A is r x in, B out x r, the shift out x in")
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.shift = nn.Parameter(shift, requires_grad=False)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    def dense(self) -> Tensor:
        return self.shift + super().dense()

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return True

    def side(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.shift.to(x.dtype)) + super().side(x)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return super().act(x, y + nn.functional.linear(x, self.shift.to(x.dtype)).to(y.dtype), weight)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        # One sum of matrices costs less than a second product with every row of activations.
        return linear_with_branch(self, x, weight, bias, *self.factors(), self.shift)

    def look_up(self, tokens: Tensor, layer: nn.Embedding) -> Tensor:
        return nn.functional.embedding(tokens, self.shift.T, layer.padding_idx) + super().look_up(tokens, layer)

    def convolve(self, x: Tensor, layer: nn.Module) -> Tensor:
        return convolved(self.dense(), x, layer)
