"""Monarch: expressive structured matrices for efficient and accurate training (Dao et al. 2022, arXiv:2204.00595).

M = P2 blockdiag(w2) P1 blockdiag(w1): K blocks on the input, L on the output, joined at rank R; M can have full rank.
`mode="delta"`: W' = W + M with w2 = 0 and R = 1 (our use of it). `mode="project"`: W' = M, started at the nearest
Monarch matrix to W, then trained, the paper's dense-to-sparse fine-tuning; R is that of the official layer, min(in,
out) / (K L). At a width of 768 it is 48 for K = L = 4, half of the weight's values, and 1 for `blocks=[32, 24]`. The
official projection knows square layers and R = 1 only; here every strided block is cut to rank R, for any shape.
`densify=0.9` is the paper's sparse-to-dense: for the rest of the steps M is multiplied out and all its entries train.
(In the authors' scripts for BERT the first of two phases is sparse, 7038 of 8601 steps, and the second dense.)
Use delta for high rank at low cost, project to make a model smaller while tuning it.
"""

from typing import Any

import torch

from ...core import fields
from ...core.experts import mapped
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.moments import refuse_sharing, regroup
from ...core.operators.monarch import Monarch as Operator
from ...core.operators.monarch import projected
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight

BLOCKS = "a whole number of at least 1, or a list of two of them, K and L"


def _pair(blocks: Any) -> list[Any]:
    return list(blocks) if isinstance(blocks, (list, tuple)) else [blocks, blocks]


def _good(blocks: Any) -> bool:
    return len(_pair(blocks)) == 2 and all(type(number) is int and number >= 1 for number in _pair(blocks))


@method("monarch", paper="2204.00595", family="structured")
class Monarch(WeightMethod):
    """Two block-diagonal factors; trains `R (L in + K out)` values a layer, in and out rounded up to blocks."""

    everywhere = ("densify",)
    only = (("dropout", "mode", ("delta",)), ("densify", "mode", ("project",)))

    mode: str = fields.choice("delta", ["delta", "project"], "M beside the weight, or in its place")
    blocks: Any = fields.declared(4, "blocks of w1 and w2, K = L or [K, L]; at most the smaller width", BLOCKS, _good)
    rank: int | None = fields.positive(
        None, "R, of every strided block; none: 1 for delta, the official width for project", optional=True
    )
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch; delta only")
    densify: float | None = fields.number(
        None, "share of the steps after which M goes on as a dense matrix; project only", above=0, high=1
    )

    def delta(self, weight: Weight) -> Operator:
        k, l, rank, s, p = self._sizes(weight)
        if self.mode == "project":
            w1, w2 = projected(weight.dense(), k, l, rank)
        else:
            w1, w2 = kaiming(k, rank * l, p), zeros(l, s, k * rank)
        return Operator(w1, w2, weight.fan_out, weight.fan_in, self.mode == "project", self.dropout)

    def rules(self) -> list[Rule]:
        return [] if self.densify is None else [Densification(self.densify)]

    def _sizes(self, weight: Weight) -> tuple[int, int, int, int, int]:
        """K, L, R, S, P."""
        narrow = min(weight.fan_in, weight.fan_out)
        k, l = (min(number, narrow) for number in _pair(self.blocks))
        s, p = -(-weight.fan_out // l), -(-weight.fan_in // k)
        rank = self.rank or (1 if self.mode == "delta" else -(-narrow // (k * l)))
        return k, l, min(rank, s, p), s, p

    def count(self, weight: Weight) -> int:
        k, l, rank, s, p = self._sizes(weight)
        return rank * k * l * (s + p)


class Densification(Rule):
    """Exchanges the factors for their product after a share of the steps.

    Attributes:
        done: whether they are exchanged.
    """

    sees_gradients = False
    memory = ("done",)

    def __init__(self, share: float) -> None:
        self.share, self.done = share, False

    def attached(self, run: Run) -> None:
        refuse_sharing("monarch with densify")

    def step_end(self, run: Run) -> None:
        if not self.done and run.step >= int(self.share * run.total_steps):
            self.done = True
            self.resumed(run)

    @torch.no_grad()
    def resumed(self, run: Run) -> None:
        if self.done:
            for name, part in list(run.tuned.of_kind(Operator)):
                run.tuned.exchange(name, mapped(part, Operator.multiplied_out))
            regroup(run.tuned, run.optimizer)
