"""TriAdaptLoRA: brain-inspired triangular adaptive low-rank adaptation (Liang et al. 2025, arXiv:2501.08008).

W' = W + alpha / (r + 1e-5) B (L + U) A,  L and U block-triangular, both with the blocks of the diagonal. Ranks start at
`init_rank` and grow by blocks of `grow`: every `interval` steps after the warm-up, while the ranks' sum is below
`reference` a layer, a layer's score is the rise of ||L + U|| / blocks since the last check, and the m layers of highest
score get a block, m = what is missing times the share of the run that has passed (`growth="exponential"`: its power).
The public implementation starts B, L and U all at zero, where no gradient reaches anything; here A, L and the first U
~ N(0, 0.02^2), B = 0, and a new block has U and B = 0, so that growing does not change the function. Its divisor is the
present rank, which rescales what was learnt; here it is `reference` (`divisor="rank"`: the present one, B rescaled).
It has no scripts, and checks at every step unless told otherwise; rate, warm-up and interval are ours.
Use it where AdaLoRA's scores cost too much: no gradient enters one.
"""

import math
from functools import partial
from typing import Any

from torch import Tensor

from ...core import fields
from ...core.experts import setting
from ...core.growth import GrowingRanks
from ...core.init import normal, zeros
from ...core.method import WeightMethod
from ...core.moments import grow
from ...core.operators.triangular import Triangular, widths
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight

STD = 0.02


@method("triadaptlora", paper="2501.08008", family="adaptive")
class TriAdaptLoRA(WeightMethod):
    """Low rank that grows; trains `r (in + out)` values a layer and two triangles, r the rank at the time."""

    ordered = (("init_rank", "reference", "ranks only grow"),)
    everywhere = ("reference", "growth", "warmup", "interval", "gamma")

    init_rank: int = fields.positive(1, "rank of every layer at the start, the width of its first block")
    reference: int = fields.positive(8, "average rank of the layers at which growth stops")
    grow: int | None = fields.positive(
        None, "ranks that a layer gets at a time; none: half of the reference, as in the paper", optional=True
    )
    growth: str = fields.choice("linear", ("linear", "exponential"), "how many layers grow, over the run")
    divisor: str = fields.choice("reference", ("reference", "rank"), "divisor of the scale")
    alpha: float = fields.number(16.0, "numerator of the scale", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    warmup: float = fields.number(0.05, "time before the first check: below 1 a share of the run, else steps", low=0)
    interval: int | None = fields.positive(None, "steps between two checks; none: a fiftieth of the run", optional=True)
    gamma: float = fields.number(0.5, "weight of the orthogonality penalty", low=0)

    @property
    def block(self) -> int:
        """Ranks that a layer gets at a time."""
        return self.grow or max(1, self.reference // 2)

    def delta(self, weight: Weight) -> Triangular:
        r = self.init_rank
        a, b = normal(r, weight.fan_in, std=STD), zeros(weight.fan_out, r)
        lower, upper = normal(r * r, std=STD), normal(r * r, std=STD)
        reference = self.reference if self.divisor == "reference" else None
        return Triangular(a, b, lower, upper, self.alpha, reference, r, self.block, self.dropout)

    def rules(self) -> list[Rule]:
        return [Strips(self)]

    def count(self, weight: Weight) -> int:
        return self.init_rank * (weight.fan_in + weight.fan_out) + 2 * self.init_rank**2


class Strips(GrowingRanks):
    """Checks the cores and lets the layers grow whose core rose most.

    Attributes:
        previous: by part, the norm of its core over its blocks at the last check.
    """

    kind = Triangular
    memory = ("previous",)

    def __init__(self, method: TriAdaptLoRA) -> None:
        super().__init__(method, method.reference)
        self.previous: dict[str, float] = {}

    def factors(self, part: Any) -> tuple[Tensor, Tensor]:
        return part.b, part.a

    def interval(self, run: Run) -> int:
        return self.method.interval or max(1, run.total_steps // 50)

    def attached(self, run: Run) -> None:
        super().attached(run)
        first = self.first(run)
        if self.missing(run) > 0 and first > run.total_steps > 0:
            raise ValueError(
                f"triadaptlora: the first check is at step {first}, the run has {run.total_steps}; "
                "shorten warmup or interval"
            )
        self.previous = {name: self._norm(part) for name, part in self.parts(run).items()}

    def step_end(self, run: Run) -> None:
        self.check(run, run.step)

    def _norm(self, part: Any) -> float:
        """The norm of a core over the number of its blocks; over a stack, of all its cores."""
        cores = [one.core() for one in part.each()] if hasattr(part, "each") else [part.core()]
        norm = math.sqrt(sum(float(core.detach().square().sum()) for core in cores))
        return norm / len(widths(self.rank(part), setting(part, "first"), setting(part, "block")))

    def number(self, missing: int, step: int, run: Run) -> int:
        """How many layers grow at a check, given how many ranks are missing."""
        first = run.steps(self.method.warmup)
        share = (step - first) / max(1, run.total_steps - first)
        number = int(missing * share) if self.method.growth == "linear" else int(math.exp(share * math.log(missing)))
        return min(max(1, number), len(self.parts(run)))

    def grow(self, parts: dict[str, Any], missing: int, run: Run) -> None:
        now = {name: self._norm(part) for name, part in parts.items()}
        rise = {name: norm - self.previous[name] for name, norm in now.items()}
        self.previous = now
        for name in sorted(parts, key=lambda name: -rise[name])[: self.number(missing, run.step, run)]:
            self._add_block(name, parts[name], run)

    def _add_block(self, name: str, part: Any, run: Run) -> None:
        """Rows of A and of L at random, columns of B and of U zero."""
        width, old, lead = setting(part, "block"), self.rank(part), part.a.shape[:-2]
        drawn = partial(normal, *lead, std=STD, generator=run.generator(name))
        if setting(part, "reference") is None:
            part.b.mul_((old + width + 1e-5) / (old + 1e-5))
        grow(part.a, drawn(width, part.a.shape[-1]), -2, run.optimizer)
        grow(part.b, zeros(*lead, part.b.shape[-2], width), -1, run.optimizer)
        grow(part.lower, drawn(width * (old + width)), -1, run.optimizer)
        grow(part.upper, zeros(*lead, width * (old + width)), -1, run.optimizer)
