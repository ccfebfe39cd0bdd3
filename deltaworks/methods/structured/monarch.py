"""Monarch: expressive structured matrices for efficient and accurate training (Dao et al. 2022, arXiv:2204.00595).

M = P2 blockdiag(w2) P1 blockdiag(w1): K blocks on the input, L on the output, joined at rank R; M can have full rank.
`mode="delta"`: W' = W + M with w2 = 0 (our use of it). `mode="project"`: W' = M, started at the nearest Monarch matrix
to W, then trained, the paper's dense-to-sparse fine-tuning; the official projection knows square layers and R = 1 only,
here every strided block is cut to rank R, for any shape. R = min(in, out) / blocks^2 is the official layer's width.
Use delta for high rank at low cost, project to make a model smaller while tuning it.
"""

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.monarch import Monarch as Operator
from ...core.operators.monarch import projected
from ...core.registry import method
from ...model.weights import Weight


@method("monarch", paper="2204.00595", family="structured")
class Monarch(WeightMethod):
    """Two block-diagonal factors; trains `R (L in + K out)` values a layer, in and out rounded up to blocks."""

    mode: str = fields.choice("delta", ["delta", "project"], "M beside the weight, or in its place")
    blocks: int = fields.positive(4, "K = L, blocks of either factor; at most the smaller width")
    rank: int | None = fields.positive(1, "R, of every strided block; none for the official width", optional=True)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch; delta only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "project" and self.dropout:
            raise ValueError(f"monarch: dropout={self.dropout} is for mode='delta'; a projected weight has no branch")

    def delta(self, weight: Weight) -> Operator:
        blocks, rank, s, p = self._sizes(weight)
        if self.mode == "project":
            w1, w2 = projected(weight.dense(), blocks, blocks, rank)
        else:
            w1, w2 = kaiming(blocks, rank * blocks, p), zeros(blocks, s, blocks * rank)
        return Operator(w1, w2, weight.fan_out, weight.fan_in, self.mode == "project", self.dropout)

    def _sizes(self, weight: Weight) -> tuple[int, int, int, int]:
        """Blocks, R, S, P."""
        blocks = min(self.blocks, weight.fan_in, weight.fan_out)
        s, p = -(-weight.fan_out // blocks), -(-weight.fan_in // blocks)
        rank = self.rank or -(-min(weight.fan_in, weight.fan_out) // blocks**2)
        return blocks, min(rank, s, p), s, p

    def count(self, weight: Weight) -> int:
        blocks, rank, s, p = self._sizes(weight)
        return rank * blocks * blocks * (s + p)
