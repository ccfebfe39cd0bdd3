"""MiSS: matrix shard sharing, the final form of Bone (Kang and Yin 2024, arXiv:2409.15371).

dW[o, j] = D[j mod r, o],  D: rank x out = 0.  Input features that are r apart are added up and meet one matrix: a LoRA
whose A is [I I ... I], for the parameters of B alone, with no product as wide as the input.
`mini` makes D `rank x mini`, repeated along the output. There is no alpha.
The authors' scripts take a rate of 2e-5 for bases of billions of parameters; 2e-4 is for smaller ones and short runs.
Use it where LoRA's step is too slow or too hungry.
"""

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod
from ...core.operators.blocks import Tiled
from ...core.registry import method
from ...model.weights import Weight


@method("miss", paper="2409.15371", family="lowrank")
class MiSS(WeightMethod):
    """One pattern tiled along the input; trains `rank * out` values a layer."""

    default_lr = 2e-4

    rank: int = fields.positive(64, "r, number of input sums; at most the input's width")
    mini: int | None = fields.positive(
        None, "width of the pattern along the output, a divisor of it; none for all of it"
    )
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")

    def delta(self, weight: Weight) -> Tiled:
        if self.mini is not None and weight.fan_out % self.mini:
            place = f"the {weight.fan_out} outputs of {weight.path or 'a weight'}"
            raise ValueError(f"miss: mini={self.mini} does not divide {place}; take a divisor, or none")
        d = zeros(min(self.rank, weight.fan_in), self.mini or weight.fan_out)
        return Tiled(d, weight.fan_out, weight.fan_in, dropout=self.dropout)

    def count(self, weight: Weight) -> int:
        return min(self.rank, weight.fan_in) * (self.mini or weight.fan_out)
