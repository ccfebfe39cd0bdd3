"""SoRA: sparse low-rank adaptation (Ding et al. 2023, arXiv:2311.11696).

W' = W + alpha / r B diag(g) A,  A Kaiming uniform, B = 0, g ~ N(0, 1). After every step each gate is drawn towards zero
by a threshold, g <- sign(g) max(|g| - xi, 0), so ranks switch off exactly; a gate at zero may return. In the end zero
ranks are dropped; the divisor stays r. The official code thresholds twice, killing all below 2 xi; this is the paper's
proximal step, with xi constant as in the code (`by_rate`: times the learning rate, as in the paper). `l1` adds l1 mean
|g| to the loss (10 or 1e-3 in their scripts, with rates of 8e-4 and 1.2e-3). A rising `xi_end` is the paper's schedule
of growing sparsity, here in one run.
Use it when layers need different ranks and the run's length is not known.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...core import fields, ranks
from ...core.init import kaiming, normal, zeros
from ...core.method import WeightMethod
from ...core.operators.triplet import Triplet
from ...core.ranks import triplets
from ...core.registry import method
from ...core.rule import Rule, Run, pooled
from ...core.tuned import Tuned
from ...model.weights import Weight


@method("sora", paper="2311.11696", family="adaptive")
class SoRA(WeightMethod):
    """LoRA with gates driven to zero; trains `rank * (in + out + 1)` values a layer at the start."""

    everywhere = ("xi", "xi_end", "by_rate", "l1")

    rank: int = fields.positive(8, "r, rank of every layer at the start")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / r", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    xi: float = fields.number(3e-4, "threshold of every step", low=0)
    xi_end: float | None = fields.number(None, "threshold at the end, reached linearly; none for a constant one", low=0)
    by_rate: bool = fields.flag(False, "multiply the threshold by the gates' learning rate")
    l1: float = fields.number(0.0, "weight of mean |g| in the loss", low=0)

    def delta(self, weight: Weight) -> Triplet:
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        return Triplet(b, normal(self.rank), a, scale=self.alpha / self.rank, dropout=self.dropout)

    def group(self, name: str) -> dict[str, float]:
        return {"weight_decay": 0.0} if name == "l" else {}

    def rules(self) -> list[Rule]:
        return [Threshold(self)]

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out + 1)


class Threshold(Rule):
    """The proximal step on the gates; the threshold follows from the step alone, so there is nothing to remember."""

    def __init__(self, method: SoRA) -> None:
        self.method = method

    def xi(self, run: Run, gate: nn.Parameter) -> float:
        """The threshold of the step just made."""
        start, end = self.method.xi, self.method.xi_end
        xi = start if end is None else start + (end - start) * run.step / max(run.total_steps, 1)
        if self.method.by_rate:
            groups = run.optimizer.param_groups if run.optimizer is not None else []
            rates = [group["lr"] for group in groups if any(p is gate for p in group["params"])]
            if not rates:
                raise ValueError("sora: by_rate=True needs the run's optimizer, and the gates are in none")
            xi *= rates[0]
        return xi

    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        for gate in gates(run.tuned):
            gate.copy_(gate.sign() * (gate.abs() - self.xi(run, gate)).clamp_min(0))
        if run.sampled:
            ranks.record(run)

    def penalty(self, run: Run) -> Tensor | None:
        return self.method.l1 * pooled(gate.abs() for gate in gates(run.tuned)).mean() if self.method.l1 else None

    def finished(self, run: Run) -> None:
        ranks.drop(run.tuned, run.optimizer)


def gates(tuned: Tuned) -> Iterator[nn.Parameter]:
    """The gates of every layer."""
    return (l for _, _, l, _ in triplets(tuned))
