"""LoKr: low-rank Kronecker product (LyCORIS, Yeh et al. 2024, arXiv:2309.14859).

dW = s kron(W1, W2),  out = o1 o2 and in = i1 i2 split by `factor`;  W1: o1 x i1 full (low-rank too with `both`),
W2: o2 x i2 low-rank while r < max(o2, i2) / 2, else full;  s = alpha / r. W1 = 0 and W2 Kaiming uniform (a = sqrt 5) as
in `peft`; `init="lycoris"` turns that around and, as that library, takes s = 1 when both factors are full.
Use it for the smallest useful files: a thousand values for a 768 x 768 layer.
"""

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.kronecker import Kronecker
from ...core.registry import method
from ...model.weights import Weight


@method("lokr", paper="2309.14859", family="structured")
class LoKr(WeightMethod):
    """A Kronecker product with a low-rank factor; `o1 i1 + r (o2 + i2)` values a layer, `o2 i2` for a full factor."""

    rank: int = fields.positive(8, "inner dimension r of a low-rank factor")
    alpha: float = fields.number(8.0, "numerator of the scale", above=0)
    factor: int = fields.whole(-1, "smaller part of each side, where it divides it; -1 for nearest to square", low=-1)
    both: bool = fields.flag(False, "the first factor may be low-rank as well")
    init: str = fields.choice("peft", ("peft", "lycoris"), "whose starting values and scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor == 0:
            raise ValueError("lokr: factor=0 is not allowed; it must be -1 or a whole number of at least 1")

    def delta(self, weight: Weight) -> Kronecker:
        (o1, o2), (i1, i2) = split(weight.fan_out, self.factor), split(weight.fan_in, self.factor)
        thin1, thin2 = self._thin(o1, i1, first=True), self._thin(o2, i2, first=False)
        lycoris, rank = self.init == "lycoris", self.rank
        scale = 1.0 if lycoris and not thin1 and not thin2 else self.alpha / rank
        factors = {}
        if thin1:
            factors["w1_a"] = kaiming(o1, rank) if lycoris else zeros(o1, rank)
            factors["w1_b"] = kaiming(rank, i1)
        else:
            factors["w1"] = kaiming(o1, i1) if lycoris else zeros(o1, i1)
        if thin2:
            factors["w2_a"] = kaiming(o2, rank)
            factors["w2_b"] = zeros(rank, i2) if lycoris else kaiming(rank, i2)
        else:
            factors["w2"] = zeros(o2, i2) if lycoris else kaiming(o2, i2)
        return Kronecker(**factors, scale=scale)

    def _thin(self, o: int, i: int, *, first: bool) -> bool:
        return (self.both or not first) and self.rank < max(o, i) / 2

    def count(self, weight: Weight) -> int:
        (o1, o2), (i1, i2) = split(weight.fan_out, self.factor), split(weight.fan_in, self.factor)
        first = self.rank * (o1 + i1) if self._thin(o1, i1, first=True) else o1 * i1
        return first + (self.rank * (o2 + i2) if self._thin(o2, i2, first=False) else o2 * i2)


def split(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two: (`factor`, the rest) where that divides it, else the two nearest to square whose
    smaller, which comes first, is at most `factor` (any for -1).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(d for d in range(1, min(limit, int(size**0.5)) + 1) if size % d == 0)
    return small, size // small
