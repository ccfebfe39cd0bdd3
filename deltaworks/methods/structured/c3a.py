"""C3A: parameter-efficient fine-tuning via circular convolution (Chen et al. 2024, arXiv:2407.19342).

W' = W + g C,  C made of b x b circulant blocks, each one trained vector: `out in / b` values, yet of any rank.
The authors' code, in `peft`, divides by the input width (g = 1 / in), the paper's formula does not (g = 1); the usual
rates, 1e-1 and more, belong to the former, which is the default. The default start, Xavier, changes the output.
Gradients here are the derivatives; those written out in `peft` 0.21 mirror the blocks for b > 2 and are not.
Use it when low rank is what holds LoRA back and memory is short.
"""

import math

from ...core import fields
from ...core.init import normal, uniform
from ...core.method import WeightMethod
from ...core.operators.circulant import Circulant
from ...core.registry import method
from ...model.weights import Weight


@method("c3a", paper="2407.19342", family="structured")
class C3A(WeightMethod):
    """Circulant blocks; trains `out * in / block` values a layer."""

    exact_at_start = False
    default_lr = 1e-1

    block: int | None = fields.positive(None, "side b of a block, a divisor of in and out; none for the largest")
    init: str = fields.choice("xavier", ["xavier", "zeros", "normal", "kaiming"], "starting values of the vectors")
    normalise: bool = fields.flag(True, "divide by the input width; the paper's formula does not")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")

    def delta(self, weight: Weight) -> Circulant:
        fan_out, fan_in, b = weight.fan_out, weight.fan_in, self.side(weight)
        shape = (fan_out // b, fan_in // b, b)
        bound = {"xavier": math.sqrt(6 / (fan_in + fan_out)), "kaiming": math.sqrt(1 / fan_in), "zeros": 0.0}
        w = normal(*shape) if self.init == "normal" else uniform(*shape, bound=bound[self.init])
        return Circulant(w, scale=1 / fan_in if self.normalise else 1.0, dropout=self.dropout)

    def side(self, weight: Weight) -> int:
        """b at one weight.

        Raises:
            ValueError: when `block` does not divide both of the weight's sides.
        """
        largest = math.gcd(weight.fan_out, weight.fan_in)
        if self.block is not None and largest % self.block:
            place = f"{weight.path or 'a weight'} ({weight.fan_out} x {weight.fan_in})"
            raise ValueError(f"c3a: block={self.block} does not divide {place}; take a divisor of {largest}, or none")
        return self.block or largest

    def count(self, weight: Weight) -> int:
        return weight.fan_out * weight.fan_in // self.side(weight)
