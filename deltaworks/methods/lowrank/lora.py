"""LoRA: low-rank adaptation of large language models (Hu et al. 2021, arXiv:2106.09685).

W' = W + s B A,  A: rank x in ~ Kaiming uniform (a = sqrt 5),  B: out x rank = 0,  s = alpha / rank.
`rslora` takes s = alpha / sqrt(rank), which keeps the branch's size independent of the rank (Kalajdzievski 2023,
arXiv:2312.03732). `b_lr_ratio` lets B learn that many times faster than A: LoRA+ (Hayou et al. 2024, arXiv:2402.12354).
On an embedding A starts at zero and B is normal, as A's rows are looked up.
Use it as the default: cheap, mergeable, served everywhere.
"""

import math

from torch import nn

from ...core import fields
from ...core.init import kaiming, normal, zeros
from ...core.method import WeightMethod
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...model.weights import Weight


@method("lora", paper="2106.09685", family="lowrank")
class LoRA(WeightMethod):
    """Low-rank adaptation; trains `rank * (in + out)` values a layer."""

    rank: int = fields.positive(8, "inner dimension r")
    alpha: float = fields.number(16.0, "numerator of the scale", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    rslora: bool = fields.flag(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    b_lr_ratio: float = fields.number(1.0, "learning rate of B over that of A; LoRA+ takes 16", above=0)

    @property
    def scale(self) -> float:
        """s, the factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self, weight: Weight) -> LowRank:
        if isinstance(weight.layer, nn.Embedding):
            a, b = zeros(self.rank, weight.fan_in), normal(weight.fan_out, self.rank)
            return LowRank(a, b, scale=self.scale)
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        return LowRank(a, b, scale=self.scale, dropout=self.dropout)

    def group(self, name: str) -> dict[str, float]:
        return {"lr_scale": self.b_lr_ratio} if name == "b" and self.b_lr_ratio != 1.0 else {}

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out)
