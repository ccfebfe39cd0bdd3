"""MELoRA: mini-ensemble low-rank adapters (Ren et al. 2024, arXiv:2402.17263).

W' = W + s blockdiag(B_1 A_1, ..., B_n A_n),  A_i: rank x in/n Kaiming uniform,  B_i: out/n x rank = 0,  s = alpha/rank.
n mini-LoRAs on contiguous slices of input and output: rank n * rank for the parameters of one LoRA of `rank`.
Use it when a higher rank is wanted than the budget allows; the scale does not fall with n.
"""

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.block_low_rank import BlockLowRank
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...model.weights import Weight


@method("melora", paper="2402.17263", family="lowrank")
class MELoRA(WeightMethod):
    """LoRA on the diagonal blocks; trains `rank * (in + out)` values a layer, whatever n is."""

    default_lr = 4e-4

    rank: int = fields.positive(8, "rank of every mini-LoRA")
    n: int = fields.positive(2, "number of mini-LoRAs; divides in and out")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(
        0.0, "probability of dropping an input feature of the branch; the paper takes 0.05"
    )

    def delta(self, weight: Weight) -> BlockLowRank | LowRank:
        n, r, scale = self.n, self.rank, self.alpha / self.rank
        if n == 1:
            a, b = kaiming(r, weight.fan_in), zeros(weight.fan_out, r)
            return LowRank(a, b, scale=scale, dropout=self.dropout)
        if weight.fan_in % n or weight.fan_out % n:
            place = f"{weight.path or 'a weight'} ({weight.fan_out} x {weight.fan_in})"
            raise ValueError(f"melora: n={n} does not divide both sides of {place}; take another n, or overrides there")
        a, b = kaiming(n, r, weight.fan_in // n), zeros(n, weight.fan_out // n, r)
        return BlockLowRank(a, b, scale=scale, dropout=self.dropout)

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out)
