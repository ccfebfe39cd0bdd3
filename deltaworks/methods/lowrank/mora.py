"""MoRA: high-rank updating (Jiang et al. 2024, arXiv:2405.12130).

y += decompress(M compress(x)),  M: square, of side floor(sqrt((in + out) rank) + 1/2), zero at the start; as many
parameters as LoRA of `rank`, and a far higher rank. `rotate` (the authors' type 6, for small ranks) turns each block of
the input by its position and gives each its own part of the output; `share` (type 1, for large ranks) adds blocks up.
Both repeat the first inputs to fill the last block; `rotate` drops blocks beyond the output's width, as the code does.
ReMoRA, for pre-training, merges M every 2,000 steps: `merge_every`. In the authors' train.py M then is zero, all that
the optimizer remembers of it is deleted (nothing is pruned), and sharing goes on in the next of four ways (types 1, 2,
3, 4, 1, ...; `rotate` has no other): inputs added up and outputs repeated r apart or among neighbours. The rate rises
again in 50 steps; here to the run's schedule (their `relora_scheduler`; their default begins a schedule anew from the
rate reached). What is merged stands beside the base, one matrix for each way.
Use it where facts must be memorised, as in continued pre-training.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod
from ...core.operators.square import Square, SquareChain, merge
from ...core.registry import method
from ...core.rule import Rule, Run
from ...core.schedules import Links, rise
from ...model.weights import Weight


@method("mora", paper="2405.12130", family="lowrank")
class MoRA(WeightMethod):
    """A square matrix between fixed operators; trains about `rank * (in + out)` values a layer."""

    default_lr = 3e-4
    everywhere = ("merge_every", "warmup")
    only = (("merge_every", "kind", ("share",)),)

    rank: int = fields.positive(8, "rank of the LoRA whose number of parameters it takes")
    kind: str = fields.choice("rotate", ["rotate", "share"], "how inputs are compressed and outputs made")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    merge_every: int | None = fields.positive(None, "ReMoRA: steps after which M is merged and begins anew; or never")
    warmup: int = fields.whole(50, "steps in which the learning rate rises again after a merge")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_every is None and self.warmup != type(self).warmup:
            raise ValueError(f"mora: warmup={self.warmup} is for merge_every, which is none")
        if self.merge_every is not None and self.warmup >= self.merge_every:
            raise ValueError(f"mora: warmup={self.warmup} must be below merge_every={self.merge_every}")

    def delta(self, weight: Weight) -> Square:
        side = self._side(weight)
        sizes = {"fan_out": weight.fan_out, "fan_in": weight.fan_in, "dropout": self.dropout}
        if self.merge_every is None:
            return Square(zeros(side, side), self.kind, **sizes)
        return SquareChain(zeros(side, side), zeros(2 * side, 2 * side), torch.eye(1, 4).view(2, 2), **sizes)

    def _side(self, weight: Weight) -> int:
        side = math.floor(math.sqrt((weight.fan_in + weight.fan_out) * self.rank) + 0.5)
        return max(side - side % 2, 2) if self.kind == "rotate" else side

    def rules(self) -> list[Rule]:
        return [Merges(self.merge_every, self.warmup)] if self.merge_every is not None else []

    def count(self, weight: Weight) -> int:
        return self._side(weight) ** 2


class Merges(Links):
    """Merges M again and again.

    Args:
        every: number of steps between two merges; a run that is no longer has none.
        warmup: steps in which the learning rate rises to the scheduled one after each.
    """

    def __init__(self, every: int, warmup: int) -> None:
        super().__init__()
        self.every, self.warmup = every, warmup

    def ends(self, run: Run) -> list[int]:
        return list(range(self.every, run.total_steps, self.every))

    def rate(self, group: dict[str, Any], done: int, length: int) -> float:
        return group["lr"] * rise(done, self.warmup) if self.tied else group["lr"]

    def tie(self, run: Run) -> Iterator[nn.Parameter]:
        for _, (m, past, at) in run.tuned.tensors_of(SquareChain, "m", "past", "at"):
            merge(m, past, at)
            yield m
