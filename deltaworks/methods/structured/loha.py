"""LoHa: low-rank Hadamard product (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS).

dW = (alpha / r) (A1 B1) * (A2 B2), elementwise;  A: out x r, B: r x in. A1, B1, A2 ~ Kaiming uniform (a = sqrt 5) and
B2 = 0, as in `peft`; `init="lycoris"` takes B1, B2 ~ N(0, 1), A1 ~ N(0, 0.1), A2 = 0, as that library does.
Use it where LoRA's rank is too low: rank up to r^2 for twice LoRA's values. It builds the weight, so it is slower.
"""

from ...core import fields
from ...core.init import kaiming, normal, zeros
from ...core.method import WeightMethod
from ...core.operators.hadamard import Hadamard
from ...core.registry import method
from ...model.weights import Weight


@method("loha", paper="2108.06098", family="structured")
class LoHa(WeightMethod):
    """Two low-rank matrices multiplied elementwise; trains `2 rank (in + out)` values a layer."""

    rank: int = fields.positive(8, "inner dimension r of both products")
    alpha: float = fields.number(8.0, "numerator of the scale", above=0)
    init: str = fields.choice("peft", ("peft", "lycoris"), "whose starting values")

    def delta(self, weight: Weight) -> Hadamard:
        rank, fan_out, fan_in = self.rank, weight.fan_out, weight.fan_in
        if self.init == "lycoris":
            b1, b2 = normal(rank, fan_in), normal(rank, fan_in)
            a1, a2 = normal(fan_out, rank, std=0.1), zeros(fan_out, rank)
        else:
            a1, a2 = kaiming(fan_out, rank), kaiming(fan_out, rank)
            b1, b2 = kaiming(rank, fan_in), zeros(rank, fan_in)
        return Hadamard(a1, b1, a2, b2, scale=self.alpha / rank)

    def count(self, weight: Weight) -> int:
        return 2 * self.rank * (weight.fan_in + weight.fan_out)
