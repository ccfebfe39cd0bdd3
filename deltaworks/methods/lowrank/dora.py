"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353).

W' = m (W + s B A) / c,  c_i = ||row i of (W + s B A)||,  m starts as c, A Kaiming uniform, B = 0,  s = alpha / rank.
The norm c is a constant for gradients (section 4.3, and the authors' code); dropout acts on the branch only.
Use it when LoRA at the same rank falls short of full fine-tuning; half LoRA's rank is often enough.
"""

import torch

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.decomposed import Decomposed
from ...core.registry import method
from ...model.weights import Weight


@method("dora", paper="2402.09353", family="lowrank")
class DoRA(WeightMethod):
    """Trained row magnitudes and low-rank trained directions; `rank * (in + out) + out` values a layer."""

    exact_gradient = False  # the norm is a constant
    default_lr = 2e-4

    rank: int = fields.positive(16, "inner dimension r")
    alpha: float = fields.number(32.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")

    def delta(self, weight: Weight) -> Decomposed:
        magnitude = torch.linalg.vector_norm(weight.dense(), dim=-1)
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        return Decomposed(magnitude, a, b, scale=self.alpha / self.rank, dropout=self.dropout)

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out) + weight.fan_out
