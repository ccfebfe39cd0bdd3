"""LoHa: low-rank Hadamard product (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS).

dW = (alpha / r) (A1 B1) * (A2 B2), elementwise;  A: out x r, B: r x in. A1, B1, A2 ~ Kaiming uniform (a = sqrt 5) and
B2 = 0, as in `peft`; `init="lycoris"` takes B1, B2 ~ N(0, 1), A1 ~ N(0, 0.1), A2 = 0, as that library does. With
`tucker` a convolution's products have cores, t: r x r x kernel (Kaiming, or N(0, 0.1) as in LyCORIS), so that A and B
have the channels alone.
Use it where LoRA's rank is too low: rank up to r^2 for twice LoRA's values. Beyond r^2 it builds the weight.
"""

from math import prod, sqrt

from ...core import fields
from ...core.init import kaiming, normal, uniform, zeros
from ...core.method import WeightMethod
from ...core.operators.hadamard import Hadamard, TuckerHadamard
from ...core.operators.row_dropout import tell
from ...core.registry import method
from ...model.weights import CONVOLUTIONS, Weight


@method("loha", paper="2108.06098", family="structured")
class LoHa(WeightMethod):
    """Two low-rank matrices multiplied elementwise; trains `2 rank (in + out)` values a layer."""

    rank: int = fields.positive(8, "inner dimension r of both products")
    alpha: float = fields.number(8.0, "numerator of the scale", above=0)
    init: str = fields.choice("peft", ("peft", "lycoris"), "whose starting values")
    row_dropout: float = fields.fraction(0.0, "probability of dropping each row of the change; linear layers only")
    module_dropout: float = fields.fraction(0.0, "probability of dropping a layer's whole change; linear layers only")
    tucker: bool = fields.flag(False, "cores for convolutions whose kernel is more than a point")

    def delta(self, weight: Weight) -> Hadamard | TuckerHadamard:
        rank, fan_out, fan_in, lycoris = self.rank, weight.fan_out, weight.fan_in, self.init == "lycoris"
        if self.row_dropout or self.module_dropout:
            tell(self.slug, weight)
        kernel = self._kernel(weight)
        if kernel > 1:
            channels, shape = fan_in // kernel, (rank, rank, kernel)
            t1, t2 = (
                normal(*shape, std=0.1) if lycoris else uniform(*shape, bound=1 / sqrt(rank * kernel)) for _ in "12"
            )
            b1 = normal(rank, channels) if lycoris else kaiming(rank, channels)
            a1 = normal(rank, fan_out, std=0.1) if lycoris else kaiming(rank, fan_out)
            b2 = normal(rank, channels) if lycoris else zeros(rank, channels)
            a2 = zeros(rank, fan_out) if lycoris else kaiming(rank, fan_out)
            return TuckerHadamard(t1, a1, b1, t2, a2, b2, scale=self.alpha / rank)
        if lycoris:
            b1, b2 = normal(rank, fan_in), normal(rank, fan_in)
            a1, a2 = normal(fan_out, rank, std=0.1), zeros(fan_out, rank)
        else:
            a1, a2 = kaiming(fan_out, rank), kaiming(fan_out, rank)
            b1, b2 = kaiming(rank, fan_in), zeros(rank, fan_in)
        return Hadamard(a1, b1, a2, b2, self.alpha / rank, self.row_dropout, self.module_dropout)

    def _kernel(self, weight: Weight) -> int:
        """Points of the kernel of a convolution that gets cores; 1 for any other weight."""
        layer = weight.layer
        return prod(layer.kernel_size) if self.tucker and isinstance(layer, CONVOLUTIONS) else 1

    def count(self, weight: Weight) -> int:
        kernel = self._kernel(weight)
        cores = 2 * self.rank**2 * kernel if kernel > 1 else 0
        return 2 * self.rank * (weight.fan_in // kernel + weight.fan_out) + cores
