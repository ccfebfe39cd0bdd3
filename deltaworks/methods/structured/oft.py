"""OFT: orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280; on the input side, OFTv2, Qiu et al. 2025,
arXiv:2506.19847).

W' = W blockdiag(R)^T, that is y = (x R) W^T block by block;  R = (I + K)(I - K)^-1 with K skew-symmetric and zero at
the start, or the first terms of its series. `eps` is COFT: after every step ||K||_F <= eps / sqrt(number of blocks).
The authors' scripts for diffusion models take rates of 1e-5 to 1e-4 (6e-5 for COFT); ours is for language models.
One sign of K throughout; `peft` turns it around for its exact transform, which reading and writing its files undoes.
Use it where low-rank updates forget too much, with quantised bases as well: the weight is never unpacked.
"""

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod
from ...core.operators.rotation import BlockRotation, leash
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight


class Leash(Rule):
    """Projects every block's skew-symmetric matrix back onto `||K||_F <= eps / sqrt(blocks)` after each step."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def step_end(self, run: Run) -> None:
        for _, (k,) in run.tuned.tensors_of(BlockRotation, "k"):
            leash(k, self.eps)


@method("oft", paper="2306.07280", family="structured")
class OFT(WeightMethod):
    """Block rotations of the input; trains `in (b - 1) / 2` values a layer, `b (b - 1) / 2` when shared."""

    default_lr = 4e-4
    everywhere = ("eps",)

    block: int = fields.positive(32, "side b of a block; the divisor of in nearest to it is taken")
    terms: int | None = fields.whole(5, "terms of the series; none for the exact transform", low=4, optional=True)
    share: bool = fields.flag(False, "one rotation for all blocks of a layer")
    dropout: float = fields.fraction(0.0, "share of the blocks that turn nothing, drawn in every call; not with share")
    eps: float | None = fields.number(
        None, "COFT: bound of the rotations, 6e-5 in the paper; none for no bound", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share and self.dropout:
            raise ValueError("oft: one rotation for all blocks has none to drop; leave dropout out, or share")

    def delta(self, weight: Weight) -> BlockRotation:
        b = nearest_divisor(weight.fan_in, self.block)
        blocks = 1 if self.share else weight.fan_in // b
        return BlockRotation(zeros(blocks, b * (b - 1) // 2), b, weight.fan_in, self.terms, self.dropout)

    def rules(self) -> list[Rule]:
        return [] if self.eps is None else [Leash(self.eps)]

    def count(self, weight: Weight) -> int:
        b = nearest_divisor(weight.fan_in, self.block)
        return (1 if self.share else weight.fan_in // b) * b * (b - 1) // 2


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller of two equally near, at least 2 where there is one."""
    divisors = [d for d in range(2, number + 1) if number % d == 0] or [1]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
