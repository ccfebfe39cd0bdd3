"""MELoRA: mini-ensemble low-rank adapters (Ren et al. 2024, arXiv:2402.17263).

W' = W + blockdiag(s_1 B_1 A_1, ..., s_n B_n A_n),  A_i: r_i x in/n Kaiming uniform,  B_i: out/n x r_i = 0,
s_i = alpha_i / r_i.  n mini-LoRAs on contiguous slices of input and output: rank sum r_i, which is n * rank where all
have one, for the parameters of one LoRA of `rank`. `ranks` and `alphas` give them one by one, as in the authors' code.
Use it when a higher rank is wanted than the budget allows; the scale does not fall with n.
"""

import math
from typing import Any

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.block_low_rank import BlockLowRank, UnequalBlocks
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...model.weights import Weight

RANKS = "a list of whole numbers of at least 1, or none"
ALPHAS = "a list of numbers above 0, or none"


def _ranks(values: Any) -> bool:
    return values is None or (_list(values) and all(type(v) is int and v >= 1 for v in values))


def _alphas(values: Any) -> bool:
    return values is None or (_list(values) and all(type(v) in (int, float) and 0 < v < math.inf for v in values))


def _list(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and len(values) > 0


@method("melora", paper="2402.17263", family="lowrank")
class MELoRA(WeightMethod):
    """LoRA on the diagonal blocks; trains `rank * (in + out)` values a layer, or `sum r_i (in + out) / n`."""

    default_lr = 4e-4
    only = (("rank", "ranks", (None,)), ("alpha", "alphas", (None,)))

    rank: int = fields.positive(8, "rank of every mini-LoRA")
    n: int = fields.positive(2, "number of mini-LoRAs; divides in and out")
    alpha: float = fields.number(16.0, "numerator of every mini-LoRA's scale alpha / rank", above=0)
    ranks: Any = fields.declared(None, "ranks of the n mini-LoRAs, instead of rank", RANKS, _ranks)
    alphas: Any = fields.declared(None, "alphas of the n mini-LoRAs, instead of alpha", ALPHAS, _alphas)
    dropout: float = fields.fraction(
        0.0, "probability of dropping an input feature of the branch; the paper takes 0.05"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ranks", "alphas"):
            if len(getattr(self, name) or [0] * self.n) != self.n:
                raise ValueError(f"melora: {name}={getattr(self, name)} is not one for each of n={self.n} mini-LoRAs")

    @property
    def minis(self) -> list[tuple[int, float]]:
        """Rank and scale of every mini-LoRA."""
        alphas = self.alphas or [self.alpha] * self.n
        return [(r, alpha / r) for r, alpha in zip(self.ranks or [self.rank] * self.n, alphas, strict=True)]

    def delta(self, weight: Weight) -> BlockLowRank | LowRank:
        n, (r, scale) = self.n, self.minis[0]
        if n == 1:
            a, b = kaiming(r, weight.fan_in), zeros(weight.fan_out, r)
            return LowRank(a, b, scale=scale, dropout=self.dropout)
        if weight.fan_in % n or weight.fan_out % n:
            place = f"{weight.path or 'a weight'} ({weight.fan_out} x {weight.fan_in})"
            raise ValueError(f"melora: n={n} does not divide both sides of {place}; take another n, or overrides there")
        fan_in, fan_out = weight.fan_in // n, weight.fan_out // n
        if len(set(self.minis)) == 1:
            return BlockLowRank(kaiming(n, r, fan_in), zeros(n, fan_out, r), scale=scale, dropout=self.dropout)
        ranks, scales = map(list, zip(*self.minis, strict=True))
        return UnequalBlocks(kaiming(sum(ranks), fan_in), zeros(sum(ranks), fan_out), ranks, scales, self.dropout)

    def count(self, weight: Weight) -> int:
        return sum(r for r, _ in self.minis) * (weight.fan_in + weight.fan_out) // self.n
