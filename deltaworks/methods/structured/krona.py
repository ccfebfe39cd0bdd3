"""KronA: parameter-efficient tuning with Kronecker adapter (Edalati et al. 2022, arXiv:2212.10650).

dW = s kron(A, B),  A: a1 x a2 ~ Kaiming uniform, B: b1 x b2 = 0,  a1 b1 = out, a2 b2 = in. The sides nearest to square,
one smaller first and one larger first, make A and B of one size, `a1 a2 + b1 b2` values, the fewest there can be.
There is no public code, so the rate is ours; the scale is tuned from 1 to 16 in the paper.
Use it for tiny adapters of full rank.
"""

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.kronecker import Kronecker
from ...core.registry import method
from ...model.weights import Weight
from .lokr import split


@method("krona", paper="2212.10650", family="structured")
class KronA(WeightMethod):
    """A Kronecker product of two full factors; trains `a1 a2 + b1 b2` values a layer."""

    scale: float = fields.number(1.0, "factor s of the product", above=0)
    rows: int | None = fields.whole(
        None, "a1, a divisor of out; none for the smaller side of out", low=1, optional=True
    )
    columns: int | None = fields.whole(
        None, "a2, a divisor of in; none for the larger side of in", low=1, optional=True
    )

    def delta(self, weight: Weight) -> Kronecker:
        (a1, b1), (a2, b2) = self._sides(weight)
        return Kronecker(w1=kaiming(a1, a2), w2=zeros(b1, b2), scale=self.scale)

    def _sides(self, weight: Weight) -> tuple[tuple[int, int], tuple[int, int]]:
        sides = []
        for name, size, wanted, default in (
            ("rows", weight.fan_out, self.rows, split(weight.fan_out, -1)[0]),
            ("columns", weight.fan_in, self.columns, split(weight.fan_in, -1)[1]),
        ):
            first = wanted or default
            if size % first:
                place = weight.path or "a weight"
                raise ValueError(
                    f"krona: {name}={wanted} does not divide the {size} of {place}; take a divisor, or none"
                )
            sides.append((first, size // first))
        return sides[0], sides[1]

    def count(self, weight: Weight) -> int:
        (a1, b1), (a2, b2) = self._sides(weight)
        return a1 * a2 + b1 * b2
