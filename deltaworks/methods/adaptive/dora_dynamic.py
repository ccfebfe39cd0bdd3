"""DoRA: dynamic rank distribution (Mao et al. 2024, arXiv:2405.17357); not the weight-decomposed method of that name.

W' = W + alpha / r0 B diag(c) A,  A, B ~ Kaiming uniform (a = 0), c = 0. Until the pruning window ends every component's
share |c_i| |b_i| |a_i| / ||B diag(c) A|| of its layer is smoothed; in the window the lowest of all layers get c = 0,
few first and many late (cubic); those masked may return until the window's end, then the choice is fixed; in the end
they are dropped. A penalty on the variance of each a_i and b_i keeps components alike. The norms come from Gram
matrices; the authors' code builds every component, and drops one at the first step even where none is due. Its rates,
1e-4 to 2.2e-4, are for 15 epochs of RoBERTa; ours is for shorter runs.
Use it as AdaLoRA, with less to keep: no gradient enters a score.
"""

import torch
from torch import Tensor

from ...core import fields, ranks
from ...core.importance import lowest
from ...core.init import kaiming_relu, zeros
from ...core.method import WeightMethod
from ...core.operators.triplet import Triplet
from ...core.ranks import triplets
from ...core.registry import method
from ...core.rule import Rule, Run, pooled
from ...core.tuned import Tuned
from ...model.weights import Weight


@method("dora_dynamic", paper="2405.17357", family="adaptive")
class DynamicDoRA(WeightMethod):
    """Components under a falling budget; trains `init_rank * (in + out + 1)` values a layer at first."""

    ordered = (("target_rank", "init_rank", "ranks only fall"),)
    everywhere = ("target_rank", "first", "last", "interval", "smoothing", "beta")

    init_rank: int = fields.positive(12, "r0, rank of every layer at the start; the paper takes 1.5 times the target")
    target_rank: int = fields.positive(8, "average rank of the layers at the end")
    alpha: float = fields.number(8.0, "numerator of the scale alpha / r0", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch; 0.1 in the paper")
    first: float = fields.fraction(0.15, "share of the run before the window")
    last: float = fields.fraction(0.5, "share of the run after it")
    interval: int = fields.positive(100, "steps between two prunings in the window")
    smoothing: float = fields.fraction(0.9, "of the scores")
    beta: float = fields.number(0.1, "weight of the variance penalty, until the window ends", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first + self.last >= 1:
            raise ValueError(f"dora_dynamic: first={self.first} and last={self.last} leave no time to prune; lower one")

    def delta(self, weight: Weight) -> Triplet:
        r = self.init_rank
        a, b = kaiming_relu(r, weight.fan_in), kaiming_relu(weight.fan_out, r)
        return Triplet(b, zeros(r), a, scale=self.alpha / r, dropout=self.dropout)

    def rules(self) -> list[Rule]:
        return [Window(self)]

    def count(self, weight: Weight) -> int:
        return self.init_rank * (weight.fan_in + weight.fan_out + 1)


class Window(Rule):
    """Smooths the scores, prunes in the window, holds the choice afterwards.

    Attributes:
        scores: by part, the smoothed share of every component.
        masked: by part, which components are out for good, once the window has ended.
    """

    memory = ("scores", "masked")

    def __init__(self, method: DynamicDoRA) -> None:
        self.method = method
        self.scores: dict[str, Tensor] = {}
        self.masked: dict[str, Tensor] = {}

    def window(self, run: Run) -> tuple[int, int]:
        """First and last step of the window."""
        first = int(self.method.first * run.total_steps)
        return first, max(first, int((1 - self.method.last) * run.total_steps))

    def pruned(self, step: int, run: Run) -> int | None:
        """How many components are out after this step; None where nothing is pruned."""
        first, end = self.window(run)
        since, length = step - first, end - first
        if not 0 <= since <= length or (since % self.method.interval and since != length):
            return None
        total = sum(l.numel() for _, _, l, _ in triplets(run.tuned))
        m = self.method
        return int(total * (m.init_rank - m.target_rank) / m.init_rank * (since / max(length, 1)) ** 3)

    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        end = self.window(run)[1]
        if run.step <= end:
            for name, share in shares(run.tuned).items():
                before = self.scores.get(name, torch.zeros_like(share)).to(share.device)
                self.scores[name] = self.method.smoothing * before + (1 - self.method.smoothing) * share
            count = self.pruned(run.step, run)
            if count is not None:
                chosen = lowest(self.scores, count)
                ranks.switch_off(run.tuned, chosen)
                if run.step == end:
                    self.masked = chosen
        else:
            ranks.switch_off(run.tuned, self.masked)
        if run.sampled:
            ranks.record(run)

    def penalty(self, run: Run) -> Tensor | None:
        if not self.method.beta or run.step >= self.window(run)[1]:
            return None
        spreads = (spread for _, p, _, q in triplets(run.tuned) for spread in (p.var(dim=-2), q.var(dim=-1)))
        return self.method.beta * pooled(spreads).mean()

    def finished(self, run: Run) -> None:
        if self.masked:
            ranks.drop(run.tuned, run.optimizer)


@torch.no_grad()
def shares(tuned: Tuned) -> dict[str, Tensor]:
    """By part, every component's Frobenius norm over that of their sum; no `out x in` matrix is built."""
    found = {}
    for name, p, l, q in triplets(tuned):
        own = l.abs() * p.norm(dim=-2) * q.norm(dim=-1)
        scaled = l.unsqueeze(-1) * q
        whole = ((p.mT @ p) * (scaled @ scaled.mT)).sum((-1, -2)).clamp_min(0).sqrt()
        found[name] = own / (whole.unsqueeze(-1) + 1e-8)
    return found
