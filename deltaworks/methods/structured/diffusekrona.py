"""DiffuseKronA: Kronecker adapters for personalised diffusion models (Marjit et al. 2024, arXiv:2402.17412).

dW = s kron(A, B),  A: a1 x a2 ~ N(0, 1 / a1^2), B: b1 x b2 = 0,  a1 b1 = out, a2 b2 = in,  on the projections of every
attention (cross-attention is named by itself: on=["attention", "cross_attention"]). Their forward pass joins the
output's axes in another order, a permuted product; this is the paper's.
Use it to personalise a diffusion model with a few values: rank is no limit, and many learning rates work.
"""

import math
from typing import Any

from ...core import fields
from ...core.init import normal, zeros
from ...core.method import WeightMethod
from ...core.operators.kronecker import Kronecker
from ...core.registry import method
from ...model.weights import Weight


@method("diffusekrona", paper="2402.17412", family="structured")
class DiffuseKronA(WeightMethod):
    """A Kronecker product on attention; trains `a1 a2 + b1 b2` values a layer."""

    refuses = ("mamba",)

    rows: int = fields.positive(64, "a1, reduced to what divides the layer's output")
    columns: int = fields.positive(8, "a2, reduced to what divides the layer's input")
    scale: float = fields.number(1.0, "factor s of the product", above=0)
    on: Any = fields.sites("attention")

    def delta(self, weight: Weight) -> Kronecker:
        a1, a2 = self._first(weight)
        b = zeros(weight.fan_out // a1, weight.fan_in // a2)
        return Kronecker(w1=normal(a1, a2, std=1 / a1), w2=b, scale=self.scale)

    def _first(self, weight: Weight) -> tuple[int, int]:
        return math.gcd(self.rows, weight.fan_out), math.gcd(self.columns, weight.fan_in)

    def count(self, weight: Weight) -> int:
        a1, a2 = self._first(weight)
        return a1 * a2 + (weight.fan_out // a1) * (weight.fan_in // a2)
