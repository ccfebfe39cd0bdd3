"""A low-rank delta that borrows one factor, or both, from a bank that several layers use."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..part import Shared
from .low_rank import Factored


class FactorBank(Shared):
    """Trained matrices by name.

    Args:
        shapes: name -> `(rows, columns)`; names hold no dot.
        members: which names the weight at a place borrows, while an adapter is being made; its parts keep their own.
    """

    settings: ClassVar[tuple[str, ...]] = ("shapes",)

    def __init__(self, shapes: dict, members: dict[Any, tuple[str | None, str | None]] | None = None) -> None:
        super().__init__()
        self.members = members or {}
        self.shapes = {name: [int(rows), int(columns)] for name, (rows, columns) in shapes.items()}
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class LentLowRank(Factored):
    """`dW = scale * B A` with A or B, or both, out of a bank.

    Args:
        bank: the shared matrices.
        lent_a, lent_b: names in the bank; None where the layer has the factor to itself.
        a: own A, `rank x in`.
        b: own B, `out x rank`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("lent_a", "lent_b", "scale", "dropout")
    borrowed: ClassVar[tuple[str, ...]] = ("bank",)

    def __init__(
        self,
        bank: FactorBank,
        lent_a: str | None,
        lent_b: str | None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for side, lent, own in (("A", lent_a, a), ("B", lent_b, b)):
            if (lent is None) == (own is None) or (lent is not None and lent not in bank.shapes):
                raise ValueError(
                    f"{side} is either the layer's own or one of the bank's {sorted(bank.shapes)}: {lent!r}"
                )
        self.bank, self.lent_a, self.lent_b = bank, lent_a, lent_b
        self.a = None if a is None else nn.Parameter(a)
        self.b = None if b is None else nn.Parameter(b)
        self.scale, self.dropout = float(scale), float(dropout)
        ours, theirs = self.factors()
        if ours.shape[0] != theirs.shape[1]:
            raise ValueError(f"factors A {list(ours.shape)} and B {list(theirs.shape)} do not have one rank")

    @property
    def rank(self) -> int:
        return self.factors()[0].shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        a = self.a if self.lent_a is None else getattr(self.bank, self.lent_a)
        b = self.b if self.lent_b is None else getattr(self.bank, self.lent_b)
        return a, b  # type: ignore[return-value]
