"""IncreLoRA: incremental parameter allocation (Zhang et al. 2023, arXiv:2308.12043).

W' = W + alpha / (n + 1e-5) sum_i l_i p_i q_i^T,  p, q ~ N(0, 0.02^2), l = 0, n active terms, one at the start. After
every backward pass each layer's I = sum |dW * dL/d(dW)| / sqrt(out in) is smoothed; every `interval` steps the `top`
layers of highest score get `grow` terms more, until the layers have `target_rank` on average. Terms learn in advance:
a reserve trains its p and q under a constant l = 1e-5 before it becomes active. New tensors begin at rate 0, rise over
`rise` steps, and fall to 0 at the run's end; the rule scales the optimizer's move of each term accordingly, counting
Adam's steps from the term's birth. As in the official code the growth rescales older terms (n is the divisor); other
than there the target is met exactly, and the reserve goes when it is met (there l is set to 0). With accumulation the
scores of a step's micro-batches add up. The authors' rates go from 3.5e-4 to 2.2e-3; they let grow every 100 to 1000
steps.
Use it when the budget is very small: nothing is spent before a layer has shown that it needs it.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.experts import mapped
from ...core.growth import GrowingRanks
from ...core.importance import Importance
from ...core.init import normal, zeros
from ...core.method import WeightMethod
from ...core.newcomers import Newcomers
from ...core.operators.growing import Growing
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight

STD, RESERVE = 0.02, 1e-5


@method("increlora", paper="2308.12043", family="adaptive")
class IncreLoRA(WeightMethod):
    """Triplets that grow; trains `init_rank * (in + out + 1) + grow * (in + out)` values a layer at the start."""

    ordered = (("init_rank", "target_rank", "ranks only grow"),)
    everywhere = ("target_rank", "grow", "top", "warmup", "interval", "rise", "advance", "beta1", "beta2", "gamma")

    init_rank: int = fields.positive(1, "active terms of every layer at the start")
    target_rank: int = fields.positive(2, "average number of terms of the layers at the end")
    grow: int | None = fields.positive(
        None, "terms that a layer gets at a time; none: half of the target, as in the paper", optional=True
    )
    top: int = fields.positive(4, "layers that grow at a time; the paper takes 2 to 6")
    alpha: float = fields.number(16.0, "numerator of the scale; the divisor is the number of active terms", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    warmup: float = fields.number(0.1, "time before the first growth: below 1 a share of the run, else steps", low=0)
    interval: int | None = fields.positive(
        None, "steps between two growths; none: so that the target is met in the middle of the run", optional=True
    )
    rise: float = fields.number(0.06, "time in which the rate of new terms rises: share of the run, or steps", low=0)
    advance: bool = fields.flag(True, "let terms in reserve learn before they become active")
    beta1: float = fields.fraction(0.85, "smoothing of the importance")
    beta2: float = fields.fraction(0.85, "smoothing of its uncertainty")
    gamma: float = fields.number(0.1, "weight of the orthogonality penalty", low=0)

    @property
    def step(self) -> int:
        """Terms that a layer gets at a time."""
        return self.grow or max(1, self.target_rank // 2)

    @property
    def waiting(self) -> int:
        """Terms in reserve at the start."""
        return self.step if self.advance and self.target_rank > self.init_rank else 0

    def delta(self, weight: Weight) -> Growing:
        n, m = self.init_rank, self.waiting
        p, q = normal(weight.fan_out, n + m, std=STD), normal(n + m, weight.fan_in, std=STD)
        return Growing(p, zeros(n), q, torch.full((m,), RESERVE), self.alpha, self.dropout)

    def rules(self) -> list[Rule]:
        return [Growth(self)]

    def count(self, weight: Weight) -> int:
        size = weight.fan_in + weight.fan_out
        return self.init_rank * (size + 1) + self.waiting * size


class Growth(GrowingRanks):
    """Scores layers, lets the highest grow, and paces what is new.

    Attributes:
        importance: of each layer's change.
        newcomers: when each term began.
    """

    kind = Growing
    memory = ("importance.smoothed", "newcomers.births")

    def __init__(self, method: IncreLoRA) -> None:
        super().__init__(method, method.target_rank)
        self.importance = Importance(method.beta1, method.beta2)
        self.newcomers = Newcomers({"p": -1, "l": -1, "q": -2})

    def rank(self, part: Any) -> int:
        return part.l.shape[-1]

    def factors(self, part: Any) -> tuple[Tensor, Tensor]:
        return part.p, part.q

    def interval(self, run: Run) -> int:
        if self.method.interval:
            return self.method.interval
        missing = (self.target - self.method.init_rank) * len(self.parts(run))
        rounds = max(1, math.ceil(missing / (self.method.top * self.method.step)))
        return max(1, (run.total_steps // 2 - run.steps(self.method.warmup)) // rounds)

    def attached(self, run: Run) -> None:
        super().attached(run)
        first = self.first(run)
        if self.missing(run) > 0 and first >= run.total_steps > 0:
            raise ValueError(
                f"increlora: layers first grow after step {first + 1}, the run has {run.total_steps}; "
                "shorten warmup or interval"
            )
        self.newcomers.know(self.parts(run))

    def step_begin(self, run: Run) -> None:
        if self.missing(run):
            self.importance.watch(self.parts(run))

    def gradients(self, run: Run) -> None:
        self.newcomers.hold(self.parts(run))

    def step_end(self, run: Run) -> None:
        parts, step = self.parts(run), run.step - 1
        self.newcomers.pace(parts, run.optimizer, step, partial(self.rate, run))
        if self.missing(run):
            self.importance.close(parts)
        self.check(run, step)

    def rate(self, run: Run, birth: int, step: int) -> float:
        """The learning rate, over the run's highest, at a step (from 0) of what began at another."""
        age, rise, length = step - birth, run.steps(self.method.rise), run.total_steps - birth
        return age / rise if age < rise else max(0.0, (length - age) / max(1, length - rise))

    def grow(self, parts: dict[str, Any], missing: int, run: Run) -> None:
        """Activate terms, and put as many new ones into the reserve (where nothing learns in advance: into use)."""
        for name in self.importance.ranked()[: self.method.top]:
            part, more = parts[name], min(self.method.step, missing)
            lead, drawn = part.l.shape[:-1], partial(normal, std=STD, generator=run.generator(name))
            p, q = drawn(*lead, part.p.shape[-2], more), drawn(*lead, more, part.q.shape[-1])
            l = torch.full((*lead, more), RESERVE if self.method.advance else 0.0)
            self.newcomers.grow(name, part, {"p": p, "l": l, "q": q}, run.step, run.optimizer)
            missing -= more
        if not missing:  # what is in reserve goes
            for name, part in parts.items():
                self.newcomers.cut(name, part, self.rank(part), run.optimizer)
                part.reserve = part.reserve[..., :0]

    def finished(self, run: Run) -> None:
        for name, part in self.parts(run).items():
            run.tuned.exchange(name, mapped(part, Growing.final))
