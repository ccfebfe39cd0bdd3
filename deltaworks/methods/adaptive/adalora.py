"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, arXiv:2303.10512).

W' = W + alpha / (r0 + 1e-5) P diag(l) Q,  P, Q ~ N(0, 0.02^2), l = 0, and a penalty that holds P and Q orthogonal.
After every step each entry's sensitivity |w dL/dw| is smoothed; the triplets of lowest score over all layers get l = 0,
as many as a cubic schedule says, until `target_rank` a layer is left. Those masked train on and may return, until
the last phase fixes the choice; then the zero triplets are dropped. As in the authors' code, the penalty averages plain
norms (the paper sums squares); unlike there, ties are broken by position, so that the budget holds exactly.
Use it when the budget is tight and layers differ; it needs to know how long the run is.
"""

import torch
from torch import Tensor

from ...core import fields, ranks
from ...core.importance import Sensitivity, lowest
from ...core.init import normal, zeros
from ...core.method import WeightMethod
from ...core.operators.triplet import Triplet, orthogonality
from ...core.ranks import triplets
from ...core.registry import method
from ...core.rule import Rule, Run
from ...core.schedules import cubic, window
from ...core.tuned import Tuned
from ...model.weights import Weight


@method("adalora", paper="2303.10512", family="adaptive")
class AdaLoRA(WeightMethod):
    """Triplets under a falling budget; trains `init_rank * (in + out + 1)` values a layer, ends with `target_rank`."""

    ordered = (("target_rank", "init_rank", "ranks only fall"),)
    everywhere = ("target_rank", "t_init", "t_final", "interval", "beta1", "beta2", "gamma")

    init_rank: int = fields.positive(12, "r0, rank of every layer at the start; the paper takes 1.5 times the target")
    target_rank: int = fields.positive(8, "average rank of the layers at the end")
    alpha: float = fields.number(16.0, "numerator of the scale; the divisor stays r0", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    t_init: float = fields.number(0.15, "time before the budget falls: below 1 a share of the run, else steps", low=0)
    t_final: float = fields.number(0.45, "time after it has fallen: below 1 a share of the run, else steps", low=0)
    interval: int = fields.positive(1, "steps between two allocations while the budget falls")
    beta1: float = fields.fraction(0.85, "smoothing of the sensitivity")
    beta2: float = fields.fraction(0.85, "smoothing of its uncertainty")
    gamma: float = fields.number(0.1, "weight of the orthogonality penalty", low=0)

    def delta(self, weight: Weight) -> Triplet:
        r, std = self.init_rank, 0.02
        p, l, q = normal(weight.fan_out, r, std=std), zeros(r), normal(r, weight.fan_in, std=std)
        return Triplet(p, l, q, scale=self.alpha / (r + 1e-5), dropout=self.dropout)

    def rules(self) -> list[Rule]:
        return [Budget(self)]

    def count(self, weight: Weight) -> int:
        return self.init_rank * (weight.fan_in + weight.fan_out + 1)


class Budget(Rule):
    """Scores triplets, masks those over budget, and drops them in the end.

    Attributes:
        sensitivity: of the entries of every tensor, smoothed, and its uncertainty.
    """

    memory = ("sensitivity.smoothed",)

    def __init__(self, method: AdaLoRA) -> None:
        self.method = method
        self.sensitivity = Sensitivity(method.beta1, method.beta2)
        self.masked: dict[str, Tensor] | None = None  # the final choice, once it is made

    def phases(self, run: Run) -> tuple[int, int]:
        """Steps before the budget falls, and the step from which on it is the target's."""
        return window(run, t_init=self.method.t_init, t_final=self.method.t_final)

    def budget(self, step: int, run: Run) -> tuple[int, bool]:
        """How many triplets may be non-zero after this step, and whether to mask now."""
        first, final = self.phases(run)
        start = sum(l.numel() for _, _, l, _ in triplets(run.tuned))
        target = start * self.method.target_rank // self.method.init_rank
        due = step > final or (step > first and step % self.method.interval == 0)
        return int(target + (start - target) * cubic(step, first, final)), due

    def attached(self, run: Run) -> None:
        self.phases(run)

    def resumed(self, run: Run) -> None:
        self.masked = None

    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        final = self.phases(run)[1]
        if run.step < final:
            self._observe(run.tuned)
        allowed, mask = self.budget(run.step, run)
        if mask:
            chosen = self.masked if self.masked is not None else self._lowest(run.tuned, allowed)
            ranks.switch_off(run.tuned, chosen)
            if run.step > final:
                self.masked = chosen
        if run.sampled:
            run.record("budget", allowed)
            ranks.record(run)

    def _observe(self, tuned: Tuned) -> None:
        for name, *tensors in triplets(tuned):
            for key, w in zip("plq", tensors, strict=True):
                if w.grad is not None:
                    self.sensitivity.observe(f"{name}.{key}", (w * w.grad).abs())

    def scores(self, tuned: Tuned) -> dict[str, Tensor]:
        """Importance of every triplet, by part: that of l plus the means of those of its p and q."""
        of = self.sensitivity.importance
        return {
            name: of(f"{name}.l", l) + of(f"{name}.p", p).mean(-2) + of(f"{name}.q", q).mean(-1)
            for name, p, l, q in triplets(tuned)
        }

    def _lowest(self, tuned: Tuned, allowed: int) -> dict[str, Tensor]:
        scores = self.scores(tuned)
        return lowest(scores, sum(score.numel() for score in scores.values()) - allowed)

    def penalty(self, run: Run) -> Tensor | None:
        pairs = ((p, q) for _, p, _, q in triplets(run.tuned))
        return self.method.gamma * orthogonality(pairs) if self.method.gamma else None

    def finished(self, run: Run) -> None:
        if run.step > self.phases(run)[0]:
            ranks.drop(run.tuned, run.optimizer)
