"""DiffoRA: differential low-rank matrix adaptation by module selection (Jiang et al. 2025, arXiv:2502.08905).

W' = W + d s B A,  s = alpha / rank,  d in {0, 1} for every weight, found by search: d = sigmoid(theta), theta = 0,
trains beside A and B for the share `search` of the run. After a warm-up of A and B alone (with B = 0 theta has no
gradient) steps go in turn to A and B and, by an Adam of their own, to the thetas; so both see halves of the data, which
are disjoint in a search no longer than an epoch. Then each block keeps LoRAs at the share `keep` of its weights, those
of largest theta; the others share one pair among all of the same kind (`share=False`: stay as they are), all A and B
begin anew, and training goes on. There is no public code: relaxation, halves, sharing follow the abstract's account;
rates and shares are ours.
Use it where only some kinds of weights should learn, and it is not known which.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.experts import mapped, setting
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.moments import refuse_sharing, regroup
from ...core.operators.gated import Gated
from ...core.operators.lent_factors import FactorBank, LentLowRank
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...core.rule import Rule, Run
from ...core.tuned import Tuned
from ...model.weights import Weight


@method("diffora", paper="2502.08905", family="adaptive")
class DiffoRA(WeightMethod):
    """LoRA where a search finds that it pays; trains `rank * (in + out) + 1` values a layer while it searches."""

    default_lr = 5e-4
    everywhere = ("search", "warmup", "theta_lr", "keep", "share")

    rank: int = fields.positive(8, "inner dimension r")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    search: float = fields.number(0.3, "time of the search: below 1 a share of the run, else steps", low=0)
    warmup: float = fields.number(0.1, "time at its beginning in which thetas stand still: share or steps", low=0)
    theta_lr: float = fields.number(1e-2, "learning rate of the thetas", above=0)
    keep: float = fields.number(0.5, "share of a block's weights that keep a LoRA of their own", low=0, high=1)
    share: bool = fields.flag(True, "let the other weights of a kind have one LoRA in common")

    def delta(self, weight: Weight) -> Gated:
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        return Gated(a, b, zeros(1), scale=self.alpha / self.rank, dropout=self.dropout)

    def rules(self) -> list[Rule]:
        return [Selection(self)]

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out) + 1


class Selection(Rule):
    """Searches, selects, and lets training begin anew.

    Attributes:
        chosen: names of the parts that keep a LoRA of their own, once they are selected.
        moments: Adam's of each theta, by part.
        thetas_made: steps that the thetas have made.
    """

    memory = ("chosen", "moments", "thetas_made")

    def __init__(self, method: DiffoRA) -> None:
        self.method = method
        self.chosen: list[str] | None = None
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.thetas_made = 0

    def attached(self, run: Run) -> None:
        refuse_sharing("diffora")
        end, warmup, steps = self.end(run), run.steps(self.method.warmup), run.total_steps
        if end >= steps > 0:
            raise ValueError(f"diffora: search takes {end} of the run's {steps} steps; leave some to train")
        if warmup > end - 2 and steps:
            raise ValueError(f"diffora: warmup takes {warmup} of the search's {end} steps; leave two or more")
        blocks = [part.site.block for _, part in run.tuned.of_kind(Gated)]
        most = max(map(blocks.count, blocks), default=0)
        if most and self.method.keep * most < 0.5 and not self.method.share:
            raise ValueError(f"diffora: keep={self.method.keep} of {most} weights is none; raise it, or let them share")

    def end(self, run: Run) -> int:
        """The last step of the search, in which A and B make a step and the thetas one at least."""
        return max(2, run.steps(self.method.search))

    def of_thetas(self, step: int, run: Run) -> bool:
        """Whether a step, from 0, is one of the thetas; A and B begin."""
        since = step - run.steps(self.method.warmup)
        return self.chosen is None and since >= 0 and since % 2 == 1

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        if self.chosen is not None:
            return
        mine = self.of_thetas(run.step, run)
        self.thetas_made += mine
        for name, part in run.tuned.of_kind(Gated):
            if mine:
                self._move(name, part.theta)
                part.a.grad = part.b.grad = None
            part.theta.grad = None  # the optimizer passes over what has no gradient

    def _move(self, name: str, theta: Tensor) -> None:
        if theta.grad is None:
            return
        m, v = self.moments.get(name, (torch.zeros_like(theta), torch.zeros_like(theta)))
        m = m.to(theta).lerp(theta.grad, 0.1)
        v = v.to(theta).lerp(theta.grad.square(), 0.001)
        self.moments[name] = m, v
        first, second = 1 - 0.9**self.thetas_made, 1 - 0.999**self.thetas_made
        theta.sub_(self.method.theta_lr * (m / first) / ((v / second).sqrt() + 1e-8))

    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        over = run.step == self.end(run)
        if self.chosen is not None or not (over or run.sampled):
            return
        thetas = {name: part.theta for name, part in run.tuned.of_kind(Gated)}
        run.record("gates", {name: float(torch.sigmoid(theta).mean()) for name, theta in thetas.items()})
        if over:
            self.chosen = self.selected(run.tuned)
            self._discretise(run, self.chosen)
            run.record("selected", {name: int(name in self.chosen) for name in thetas})

    def selected(self, tuned: Tuned) -> list[str]:
        """The parts of largest theta in every block, `round(keep * number)` of each."""
        blocks: dict[int | None, dict[str, float]] = {}
        for name, part in tuned.of_kind(Gated):
            blocks.setdefault(part.site.block, {})[name] = float(part.theta.mean())
        ordered = [sorted(thetas, key=lambda name: -thetas[name]) for thetas in blocks.values()]
        return [name for names in ordered for name in names[: math.floor(self.method.keep * len(names) + 0.5)]]

    def _discretise(self, run: Run, chosen: list[str]) -> None:
        """Exchange the gated parts for plain and shared ones, all at their start."""
        generator, parts = torch.Generator().manual_seed(run.seed), dict(run.tuned.of_kind(Gated))
        rest = [part for name, part in parts.items() if name not in chosen]
        bank = bank_for(rest, generator) if rest and self.method.share else None

        def plain(gated: Gated) -> LowRank:
            a = kaiming(*gated.a.shape, generator=generator).to(gated.a)
            return LowRank(a, torch.zeros_like(gated.b), gated.scale, gated.dropout)

        for name, part in parts.items():
            if name in chosen:
                run.tuned.exchange(name, mapped(part, plain))
            elif bank is not None:
                own = {key: setting(part, key) for key in Gated.settings}
                lent = partial(LentLowRank, bank, f"a_{kind(part)}", f"b_{kind(part)}", **own)
                run.tuned.exchange(name, mapped(part, lambda _, lent=lent: lent()), {"bank": bank})
            else:
                run.tuned.remove(name)
        regroup(run.tuned, run.optimizer)

    def resumed(self, run: Run) -> None:
        if self.chosen is not None and any(run.tuned.of_kind(Gated)):
            with torch.no_grad():
                self._discretise(run, self.chosen)


def bank_for(parts: list[Any], generator: torch.Generator) -> FactorBank:
    """One pair for every kind among some parts, A at random, B zero."""
    shapes = {f"{key}_{kind(part)}": part.get_parameter(key).shape[-2:] for key in "ab" for part in parts}
    bank = FactorBank(shapes).to(parts[0].a)
    for name in (name for name in shapes if name.startswith("a_")):
        bank.get_parameter(name).copy_(kaiming(*shapes[name], generator=generator))
    return bank


def kind(part: Any) -> str:
    """What weights that may share a pair have in common: role, or else the layer's name, and sizes."""
    role = part.site.role or part.site.path.rpartition(".")[2]
    return f"{role}_{part.b.shape[-2]}x{part.a.shape[-2]}x{part.a.shape[-1]}".replace(".", "_")
