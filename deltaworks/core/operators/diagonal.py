"""Low-rank factors between two diagonals, all of which may train: `dW = diag(u) B diag(d) A`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .low_rank import Factored


class DiagonalFactors(Factored):
    """`dW = diag(u) B diag(d) A`.

    Whether A and B train is a matter of their flags, which a rule may change: with A's down, `x` is not kept for
    backward.

    Args:
        a: `rank x in`.
        b: `out x rank`.
        d: `rank`.
        u: `out`.
        dropout: probability of zeroing an input feature of the branch in training.
        factors_train: whether A and B train, at first; the vectors always do.
    """

    settings: ClassVar[tuple[str, ...]] = ("dropout", "factors_train")
    scale = 1.0

    def __init__(
        self, a: Tensor, b: Tensor, d: Tensor, u: Tensor, dropout: float = 0.0, factors_train: bool = True
    ) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 2 or not a.shape[:1] == b.shape[1:] == d.shape or b.shape[:1] != u.shape:
            shapes = f"A {list(a.shape)}, B {list(b.shape)}, d {list(d.shape)} and u {list(u.shape)}"
            raise ValueError(f"{shapes} do not fit; A is r x in, B out x r, d has r and u out values")
        self.a, self.b = nn.Parameter(a, requires_grad=factors_train), nn.Parameter(b, requires_grad=factors_train)
        self.d, self.u = nn.Parameter(d), nn.Parameter(u)
        self.dropout, self.factors_train = float(dropout), factors_train

    @property
    def train_a(self) -> bool:  # type: ignore[override]
        """Whether anything that `x` is needed for receives gradients."""
        return self.a.requires_grad

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.u.unsqueeze(-1) * self.b * self.d
