"""SURM: structured unrestricted-rank matrices (Sehanobish et al. 2024, arXiv:2406.17740).

dW = s Circ(b * a), s T(b) T(a) (symmetric Toeplitz), s sum_t Circ(b_t) Skew(a_t) (low displacement rank p), all with
b = 0, or (alpha / r) kron(B, A) with B = 0: two numbers a feature, and yet any rank. a ~ N(0, 1) for circulant and
N(0, 0.02^2) for the others; A is Kaiming uniform. The authors' code knows square layers only: others are cut into
square tiles of the greatest common divisor of their sides, or of `tile`. (Their Toeplitz adapter multiplies a and b by
elements; the paper's product of matrices is taken here, and the root of -1 that Skew needs, of the right order.)
With `train_scale` s trains, from 0, as their `trainable_alpha`; b is then drawn as a is: two zeros would never move.
After training a circulant is kept as the one vector that it is, half of the values that trained.
Use it for full-rank changes at the price of a rank-one LoRA.
"""

import math
from typing import Any

from ...core import fields
from ...core.experts import mapped, setting
from ...core.init import kaiming, normal, zeros
from ...core.method import WeightMethod
from ...core.operators.circulant import Circulant
from ...core.operators.kronecker import Kronecker
from ...core.operators.scaled_tiles import ScaledTiles
from ...core.operators.structured_tiles import StructuredTiles
from ...core.part import Delta
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight


@method("surm", paper="2406.17740", family="structured")
class SURM(WeightMethod):
    """Structured square tiles; trains `2 p out in / tile` values a layer (one more with train_scale), or `in + out`
    (kronecker).
    """

    default_lr = 2e-3
    only = (
        ("pairs", "structure", ("ldr",)), ("rank", "structure", ("kronecker",)), ("alpha", "structure", ("kronecker",)),
        ("scale", "structure", ("circulant", "toeplitz", "ldr")),
    )  # fmt: skip

    structure: str = fields.choice("circulant", ["circulant", "toeplitz", "ldr", "kronecker"], "kind of matrix")
    tile: int | None = fields.positive(None, "side of the square tiles, a common divisor of the widths", optional=True)
    pairs: int = fields.positive(1, "p, displacement rank; ldr only")
    rank: int = fields.positive(8, "r, side of the Kronecker factors, reduced to a common divisor; kronecker only")
    scale: float = fields.number(1.0, "s; not for kronecker", above=0)
    train_scale: bool = fields.flag(False, "let s train, from 0; not for kronecker")
    alpha: float = fields.number(16.0, "numerator of alpha / r; kronecker only", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature; not for kronecker")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structure == "kronecker" and (self.dropout or self.tile is not None or self.train_scale):
            raise ValueError("surm: a Kronecker product has neither dropout nor tiles nor train_scale; leave them out")
        if self.train_scale and self.scale != 1:
            raise ValueError(f"surm: scale={self.scale:g} and train_scale=True are both given; give one")

    def delta(self, weight: Weight) -> Delta:
        if self.structure == "kronecker":
            r = self._side(weight)
            left, right = zeros(weight.fan_out // r, r), kaiming(r, weight.fan_in // r)
            return Kronecker(w1=left, w2=right, scale=self.alpha / r)
        n = self._side(weight)
        shape = (weight.fan_out // n, weight.fan_in // n, self.pairs, n)
        std = 1.0 if self.structure == "circulant" else 0.02
        a = normal(*shape, std=std)
        if self.train_scale:
            return ScaledTiles(a, normal(*shape, std=std), zeros(1), self.structure, self.dropout)
        return StructuredTiles(a, zeros(*shape), self.structure, self.scale, self.dropout)

    def rules(self) -> list[Rule]:
        return [Collapse()] if self.structure == "circulant" or self.overrides else []

    def _side(self, weight: Weight) -> int:
        common = math.gcd(weight.fan_in, weight.fan_out)
        if self.structure == "kronecker":
            return math.gcd(common, self.rank)
        if self.tile is not None and common % self.tile:
            place = f"{weight.path or 'a weight'} ({weight.fan_out} x {weight.fan_in})"
            raise ValueError(f"surm: tile={self.tile} does not divide {place}; take a divisor of {common}, or none")
        return self.tile or common

    def count(self, weight: Weight) -> int:
        if self.structure == "kronecker":
            return weight.fan_in + weight.fan_out
        return 2 * self.pairs * weight.fan_in * weight.fan_out // self._side(weight) + self.train_scale


class Collapse(Rule):
    """When training is over, keeps of every circulant its one vector."""

    sees_gradients = False

    def finished(self, run: Run) -> None:
        for name, part in list(run.tuned.of_kind(StructuredTiles, ScaledTiles)):
            if setting(part, "structure") == "circulant":
                run.tuned.exchange(name, mapped(part, collapsed))


def collapsed(tiles: Any) -> Circulant:
    """Circulant tiles as `Circulant` holds them, by their first rows; s is in `scale` or, where it trained, in b."""
    c = (tiles.b * tiles.s if isinstance(tiles, ScaledTiles) else tiles.b) * tiles.a
    return Circulant(c.detach().squeeze(2).flip(-1).roll(1, -1), scale=tiles.scale, dropout=tiles.dropout)
