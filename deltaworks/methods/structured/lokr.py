"""LoKr: low-rank Kronecker product (LyCORIS, Yeh et al. 2024, arXiv:2309.14859).

dW = s kron(W1, W2),  out = o1 o2 and in = i1 i2 split by `factor`;  W1: o1 x i1 full (low-rank too with `both`),
W2: o2 x i2 low-rank while r < max(o2, i2) / 2, else full;  s = alpha / r. W1 = 0 and W2 Kaiming uniform (a = sqrt 5) as
in `peft`; `init="lycoris"` turns that around and, as that library, takes s = 1 when both factors are full and the
smaller part of each side for W1 even where `factor` is the larger (`peft` takes `factor`).
With `tucker` a convolution's low-rank W2 has a core, t2: r x r x kernel (Kaiming), so that its factors, r x o2 and
r x i2, have the channels alone.
Use it for the smallest useful files: a thousand values for a 768 x 768 layer.
"""

from math import prod, sqrt

from ...core import fields
from ...core.init import kaiming, uniform, zeros
from ...core.method import WeightMethod
from ...core.operators.kronecker import Kronecker
from ...core.operators.row_dropout import tell
from ...core.operators.tucker_kronecker import TuckerKronecker
from ...core.registry import method
from ...model.weights import CONVOLUTIONS, Weight


@method("lokr", paper="2309.14859", family="structured")
class LoKr(WeightMethod):
    """A Kronecker product with a low-rank factor; `o1 i1 + r (o2 + i2)` values a layer, `o2 i2` for a full factor."""

    rank: int = fields.positive(8, "inner dimension r of a low-rank factor")
    alpha: float = fields.number(8.0, "numerator of the scale", above=0)
    factor: int = fields.whole(-1, "first part of each side, where it divides it; -1 for nearest to square", low=-1)
    both: bool = fields.flag(False, "the first factor may be low-rank as well")
    init: str = fields.choice("peft", ("peft", "lycoris"), "whose starting values, scale and order of the parts")
    row_dropout: float = fields.fraction(0.0, "probability of dropping each row of the change; linear layers only")
    module_dropout: float = fields.fraction(0.0, "probability of dropping a layer's whole change; linear layers only")
    rescale: bool = fields.flag(False, "divide the rows that stay by their share")
    tucker: bool = fields.flag(False, "a core for convolutions whose kernel is more than a point")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor == 0:
            raise ValueError("lokr: factor=0 is not allowed; it must be -1 or a whole number of at least 1")

    def delta(self, weight: Weight) -> Kronecker:
        if self.row_dropout or self.module_dropout:
            tell(self.slug, weight)
        made = self._shapes(weight)
        lycoris = self.init == "lycoris"
        scale = 1.0 if lycoris and made.keys() == {"w1", "w2"} else self.alpha / self.rank
        nothing = ("w2", "w2_b") if lycoris else ("w1", "w1_a")
        factors = {
            name: (zeros if name in nothing else kaiming)(*shape) for name, shape in made.items() if name != "t2"
        }
        dropouts = {"row_dropout": self.row_dropout, "module_dropout": self.module_dropout, "rescale": self.rescale}
        if "t2" not in made:
            return Kronecker(**factors, scale=scale, **dropouts)
        factors["t2"] = uniform(*made["t2"], bound=1 / sqrt(prod(made["t2"][1:])))
        return TuckerKronecker(**factors, scale=scale, **dropouts)

    def _shapes(self, weight: Weight) -> dict[str, tuple[int, ...]]:
        return shapes(weight, self.rank, self.factor, self.both, self.tucker, ordered=self.init == "lycoris")

    def count(self, weight: Weight) -> int:
        return sum(prod(shape) for shape in self._shapes(weight).values())


def shapes(
    weight: Weight, rank: int, factor: int, both: bool, tucker: bool, ordered: bool = False
) -> dict[str, tuple[int, ...]]:
    """The tensors for a weight, by name; of a convolution the channels are split, and the kernel goes to W2."""
    channels, kernel = weight.fan_in, 1
    if isinstance(weight.layer, CONVOLUTIONS):
        kernel = prod(weight.layer.kernel_size)
        channels //= kernel
    (o1, o2), (i1, i2) = split(weight.fan_out, factor, ordered), split(channels, factor, ordered)
    found: dict[str, tuple[int, ...]] = {"w1": (o1, i1)}
    if both and rank < max(o1, i1) / 2:
        found = {"w1_a": (o1, rank), "w1_b": (rank, i1)}
    if rank >= max(o2, i2) / 2:
        return found | {"w2": (o2, i2 * kernel)}
    if tucker and kernel > 1:
        return found | {"w2_a": (rank, o2), "w2_b": (rank, i2), "t2": (rank, rank, kernel)}
    return found | {"w2_a": (o2, rank), "w2_b": (rank, i2 * kernel)}


def split(size: int, factor: int, ordered: bool = False) -> tuple[int, int]:
    """`size` as a product of two: (`factor`, the rest) where that divides it, else the two nearest to square whose
    smaller, which comes first, is at most `factor` (any for -1).

    `peft` leaves `factor` first even where it is the larger of the two; LyCORIS puts the smaller first: `ordered`.
    """
    if factor > 0 and size % factor == 0:
        parts = factor, size // factor
        return (min(parts), max(parts)) if ordered else parts
    limit = size if factor == -1 else factor
    small = max(d for d in range(1, min(limit, int(size**0.5)) + 1) if size % d == 0)
    return small, size // small
