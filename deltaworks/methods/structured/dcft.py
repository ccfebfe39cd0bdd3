"""DCFT: parameter-efficient fine-tuning via deconvolution in subspace (Zhang et al. 2025, arXiv:2503.01419).

dW^T = s conv_transpose2d(a^T b^T, K, stride d),  a: 1 x in/d, b: out/d x 1, K: d x d, all ~ N(0, 0.02^2), s = alpha /
(1 + 1e-5), and a penalty that holds a and b at length one. The start is nearly, not exactly, the base; `zero_kernel`
makes it so (ours). The official code fixes d = 2; here d is reduced to what divides the layer. It comes without
scripts, so 1 as the divisor of the scale is our reading; rate and penalty are AdaLoRA's, whose recipe the paper takes.
Use it when even a rank-one LoRA has too many parameters: it needs a d-th of them, plus d^2.
"""

import math

from torch import Tensor

from ...core import fields
from ...core.init import normal, zeros
from ...core.method import WeightMethod
from ...core.operators.deconvolved import Deconvolved
from ...core.registry import method
from ...core.rule import Rule, Run, pooled
from ...model.weights import Weight


@method("dcft", paper="2503.01419", family="structured")
class DCFT(WeightMethod):
    """A deconvolved rank-one map; trains `in / d + out / d + d^2` values a layer."""

    exact_at_start = False
    everywhere = ("gamma",)

    kernel: int = fields.positive(8, "d, side and stride of the kernel, reduced to what divides both widths")
    alpha: float = fields.number(16.0, "the scale", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    gamma: float = fields.number(0.1, "weight of the penalty on the lengths of a and b", low=0)
    zero_kernel: bool = fields.flag(False, "start with K = 0, exactly at the base")

    def delta(self, weight: Weight) -> Deconvolved:
        d, std = self._side(weight), 0.02
        k = zeros(d, d) if self.zero_kernel else normal(d, d, std=std)
        a, b = normal(1, weight.fan_in // d, std=std), normal(weight.fan_out // d, 1, std=std)
        return Deconvolved(a, b, k, scale=self.alpha / (1 + 1e-5), dropout=self.dropout)

    def _side(self, weight: Weight) -> int:
        return math.gcd(self.kernel, math.gcd(weight.fan_in, weight.fan_out))

    def rules(self) -> list[Rule]:
        return [UnitLength(self.gamma)] if self.gamma else []

    def count(self, weight: Weight) -> int:
        d = self._side(weight)
        return weight.fan_in // d + weight.fan_out // d + d * d


class UnitLength(Rule):
    """`gamma` times the mean distance of `a a^T` and `b^T b` from one."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def penalty(self, run: Run) -> Tensor | None:
        every = (value for _, pair in run.tuned.tensors_of(Deconvolved, "a", "b") for value in pair)
        return self.gamma * pooled((value.square().flatten(-2).sum(-1) - 1).abs() for value in every).mean()
