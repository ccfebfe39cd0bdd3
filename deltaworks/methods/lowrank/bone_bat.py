"""Bone: block affine transformation, BAT (Kang and Yin 2024, early versions of arXiv:2409.15371).

W'[i, j] = W[i, j] + W[i, j] D + D for every r x r block of W,  D = 0 at the start,  D = D_i shared along the input
(`along="in"`, what `peft` calls bat) or D_j shared along the output (`along="out"`, the authors' Bone-row).
The weight guides its own change, which is therefore of any rank. `miss` is the later, cheaper form without W.
The authors' scripts take a rate of 2e-5 for bases of billions of parameters; 2e-4 is for smaller ones and short runs.
Use it for quality at the price of building the weight in every step.
"""

import math

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod
from ...core.operators.blocks import BlockAffine
from ...core.registry import method
from ...model.weights import Weight


@method("bone_bat", paper="2409.15371", family="lowrank")
class BoneBAT(WeightMethod):
    """An affine map of the weight's blocks; trains `rank * out` values a layer (`rank * in` along the output)."""

    default_lr = 2e-4

    rank: int | None = fields.positive(None, "side r of a block, dividing in and out; none for the largest up to 64")
    along: str = fields.choice("in", ["in", "out"], "the direction in which blocks share their matrix")

    def delta(self, weight: Weight) -> BlockAffine:
        r = self._side(weight)
        groups = (weight.fan_out if self.along == "in" else weight.fan_in) // r
        return BlockAffine(zeros(groups, r, r), self.along)

    def _side(self, weight: Weight) -> int:
        common = math.gcd(weight.fan_out, weight.fan_in)
        if self.rank is None:
            return max(r for r in range(1, min(common, 64) + 1) if common % r == 0)
        if common % self.rank:
            place = f"{weight.path or 'a weight'} ({weight.fan_out} x {weight.fan_in})"
            raise ValueError(f"bone_bat: rank={self.rank} does not divide {place}; take a divisor of {common}, or none")
        return self.rank

    def count(self, weight: Weight) -> int:
        return self._side(weight) * (weight.fan_out if self.along == "in" else weight.fan_in)
