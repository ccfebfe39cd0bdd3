"""AFLoRA: adaptive freezing of low rank adaptation (Liu et al. 2024, arXiv:2403.13269).

W' = W + diag(u) B diag(d) A,  A, B Kaiming uniform (a = 0),  d = 0.1,  u = 0. The vectors train throughout. A and B
train only where the weight is not square, and freeze one by one: every `interval` steps each gets a score, the mean
over its entries of (smoothed |gradient|) * (its smoothed deviation), and those whose score lies below the quantile
1 - keep of all entries' scores freeze, keep falling as a cubic from 1 to 0 between `t_init` and `t_final`. A frozen
matrix needs no gradient, no optimizer state, and, if it is A, no saved input. As in the official code the score is of
|g|, not |w g|.
Use it as a VeRA of low rank that learns its projections: it ends at `rank + out` trained values a layer.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...core import fields
from ...core.importance import Sensitivity
from ...core.init import kaiming_relu, zeros
from ...core.method import WeightMethod
from ...core.moments import restart
from ...core.operators.diagonal import DiagonalFactors
from ...core.registry import method
from ...core.rule import Rule, Run
from ...core.schedules import cubic, window
from ...core.tuned import Tuned
from ...model.weights import Weight


@method("aflora", paper="2403.13269", family="lowrank")
class AFLoRA(WeightMethod):
    """Two vectors and, until they freeze, two factors; `rank * (in + out) + rank + out` values a layer at first."""

    default_lr = 2e-3
    everywhere = ("t_init", "t_final", "interval", "beta1", "beta2")

    rank: int = fields.positive(4, "inner dimension r; 32 for 7B models")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    factors: str = fields.choice(
        "oblong", ("oblong", "all", "none"), "where A and B train: weights that are not square"
    )
    t_init: float = fields.number(0.05, "time before matrices freeze: below 1 a share of the run, else steps", low=0)
    t_final: float = fields.number(0.7, "time after all are frozen: below 1 a share of the run, else steps", low=0)
    interval: int = fields.positive(10, "steps that a gradient is averaged over, and between two freezes")
    beta1: float = fields.fraction(0.85, "smoothing of the gradient's size")
    beta2: float = fields.fraction(0.95, "smoothing of its deviation")

    def delta(self, weight: Weight) -> DiagonalFactors:
        a, b = kaiming_relu(self.rank, weight.fan_in), kaiming_relu(weight.fan_out, self.rank)
        d, u = torch.full((self.rank,), 0.1), zeros(weight.fan_out)
        return DiagonalFactors(a, b, d, u, dropout=self.dropout, factors_train=self._trains(weight))

    def _trains(self, weight: Weight) -> bool:
        return self.factors == "all" or (self.factors == "oblong" and weight.fan_in != weight.fan_out)

    def rules(self) -> list[Rule]:
        return [Freezing(self)]

    def count(self, weight: Weight) -> int:
        matrices = self.rank * (weight.fan_in + weight.fan_out) if self._trains(weight) else 0
        return matrices + self.rank + weight.fan_out


class Freezing(Rule):
    """Scores the factors that still train and freezes the lowest.

    Attributes:
        frozen: names of the factors that are frozen.
        sums: of |gradient| since the last score, by name, and how many steps they hold.
        sensitivity: of every factor's entries, by name.
    """

    memory = ("frozen", "sums", "window", "sensitivity.smoothed")

    def __init__(self, method: AFLoRA) -> None:
        self.method = method
        self.frozen: list[str] = []
        self.sums: dict[str, Tensor] = {}
        self.window = 0
        self.sensitivity = Sensitivity(method.beta1, method.beta2)

    def phases(self, run: Run) -> tuple[int, int]:
        """The last step before freezing, and the last step before all are frozen."""
        return window(run, t_init=self.method.t_init, t_final=self.method.t_final)

    def keep(self, step: int, run: Run) -> float:
        """The share of scores to be kept at a step, the first being 1."""
        return cubic(step, *self.phases(run))

    def attached(self, run: Run) -> None:
        self.phases(run)

    def step_begin(self, run: Run) -> None:
        for name, matrix in matrices(run.tuned):
            if name in self.frozen and matrix.requires_grad:
                self._freeze(name, matrix, run)

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        live = {name: matrix for name, matrix in matrices(run.tuned) if matrix.requires_grad}
        if live:
            self._judge(live, run)
        # In every step, so that the mean over a run is the average count that the paper compares.
        run.record("aflora.trained", sum(p.numel() for p in run.tuned.parameters()))

    def _judge(self, live: dict[str, nn.Parameter], run: Run) -> None:
        """Score what still trains, and freeze what is due."""
        step = run.step + 1
        self.window += 1
        for name, matrix in live.items():
            if matrix.grad is not None:
                size = matrix.grad.abs()
                self.sums[name] = self.sums[name].to(size).add_(size) if name in self.sums else size
        keep, due = self.keep(step, run), step % self.method.interval == 0
        if due:
            for name, total in self.sums.items():
                self.sensitivity.observe(name, total / self.window)
            self.sums, self.window = {}, 0
        doomed = list(live) if keep == 0 else self._lowest(live, keep) if keep < 1 and due else []
        for name in doomed:
            self._freeze(name, live[name], run)

    def _lowest(self, live: dict[str, nn.Parameter], keep: float) -> list[str]:
        seen = self.sensitivity.smoothed
        scores = {name: self.sensitivity.importance(name, w) for name, w in live.items() if name in seen}
        pool = torch.cat([score.flatten().cpu() for score in scores.values()])
        below = int(len(pool) * (1 - keep))
        threshold = pool.kthvalue(below).values if below else -math.inf
        return [name for name, score in scores.items() if score.mean().cpu() < threshold]

    def _freeze(self, name: str, matrix: nn.Parameter, run: Run) -> None:
        matrix.requires_grad_(False)
        restart(matrix, run.optimizer)
        self.sensitivity.smoothed.pop(name, None)
        self.sums.pop(name, None)
        if name not in self.frozen:
            self.frozen.append(name)


def matrices(tuned: Tuned) -> Iterator[tuple[str, nn.Parameter]]:
    """Every A and B by name; fused experts hold theirs stacked along a leading axis."""
    for name, pair in tuned.tensors_of(DiagonalFactors, "a", "b"):
        yield from zip((f"{name}.a", f"{name}.b"), pair, strict=True)
