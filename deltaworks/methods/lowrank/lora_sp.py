"""LoRA-SP: streamlined partial parameter adaptation (Wu et al. 2024, arXiv:2403.08822).

W' = W + s B A,  s = alpha / rank,  and a random half of the entries of A and of B never trains: those of A keep their
random value, those of B stay zero. Trained entries are packed, so gradients, optimizer state and files are half of
LoRA's; the rest is made again from a seed. No official code is published (the public repository LoRA-SP is another
method's); the paper says "half at random", and `grain` offers three readings: entries, whole components (rows of A,
columns of B), or one whole factor a layer. The rate is that of `lora`.
Use it where the optimizer's state is what does not fit.
"""

import math

from ...core import fields
from ...core.init import seed_for
from ...core.method import WeightMethod
from ...core.operators.partial import GRAINS, PartialFactors
from ...core.registry import method
from ...model.weights import Weight


@method("lora_sp", paper="2403.08822", family="lowrank")
class LoRASP(WeightMethod):
    """LoRA with a random share of its entries fixed; trains about `share * rank * (in + out)` values a layer."""

    rank: int = fields.positive(8, "inner dimension r")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.05, "probability of dropping an input feature of the branch")
    share: float = fields.number(
        0.5, "part of the entries that trains (grain=matrix: one factor of two)", above=0, high=1
    )
    grain: str = fields.choice("element", GRAINS, "what is chosen at random")
    seed: int = fields.whole(0, "seed of the choice and of A")

    def delta(self, weight: Weight) -> PartialFactors:
        return PartialFactors(
            weight.fan_in,
            weight.fan_out,
            self.rank,
            self.share,
            self.grain,
            seed_for(self.seed, weight),
            scale=self.alpha / self.rank,
            dropout=self.dropout,
        )

    def count(self, weight: Weight) -> int:
        fan_in, fan_out, rank = weight.fan_in, weight.fan_out, self.rank
        if self.grain == "matrix":
            return rank * (
                fan_out if PartialFactors.fixed_factor(self.grain, seed_for(self.seed, weight)) == "a" else fan_in
            )
        if self.grain == "component":
            return math.ceil(self.share * rank) * (fan_in + fan_out)
        return math.ceil(self.share * rank * fan_in) + math.ceil(self.share * rank * fan_out)
