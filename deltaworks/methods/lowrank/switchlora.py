"""SwitchLoRA: switched low-rank adaptation can learn full-rank information (Zhou et al. 2024, arXiv:2406.06564).

W' = W + S + s B A,  s = alpha / rank,  S = -s B0 A0 at the start. Before every step a few rows of A, and a few columns
of B, are exchanged for candidates from a pool, and S takes up the difference, so the function stays. What a switched
vector is multiplied by keeps still for `still` steps, its Adam moments and step count begun anew. Switches come at a
rate of rank / interval a step and layer, the interval growing from `interval` by 1 / 0.3 within `decay` of the run.
The base itself is untouched: S stands beside it in full precision, `in * out` values a layer, as the switches' sum has
full rank. The rule makes the Adam step, since every row has a step count of its own; learning rate, betas and decay are
those of the run's optimizer, which keeps no state for these tensors. Pools live on the CPU, hold what came back from
use (a candidate is drawn when its turn comes first), and go when training ends.
Use it to pre-train, or to fine-tune at length, with a low-rank optimizer state; `also=` trains embeddings, norms, head.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ...core import fields, row_adam
from ...core.experts import setting
from ...core.init import uniform
from ...core.method import WeightMethod
from ...core.operators.shifted import Shifted
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight


@method("switchlora", paper="2406.06564", family="lowrank")
class SwitchLoRA(WeightMethod):
    """LoRA whose vectors are exchanged while it trains; trains `rank * (in + out)` values a layer at a time."""

    default_lr = 1e-2
    everywhere = ("interval", "decay", "still", "seed")

    rank: int | None = fields.positive(None, "r; none: a quarter of the layer's smaller width", optional=True)
    alpha: float = fields.number(1.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    interval: float = fields.number(40.0, "steps between two switches of one vector, at the start", above=0)
    decay: float = fields.number(0.1, "share of the run after which the rate of switches is 0.3 of the first", above=0)
    still: int = fields.whole(5, "steps that the partner of a switched vector stands still")
    seed: int = fields.whole(0, "seed of the pools, beside the run's")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval < 2 * self.still:
            raise ValueError(
                f"switchlora: interval={self.interval:g} must be at least twice still={self.still}, so that one of the "
                "two factors can always move"
            )

    def _rank(self, weight: Weight) -> int:
        smaller = min(weight.fan_in, weight.fan_out)
        return min(self.rank or max(1, smaller // 4), smaller)

    def delta(self, weight: Weight) -> Shifted:
        r = self._rank(weight)
        of_a, of_b = bounds(weight.fan_in, weight.fan_out, r)
        a, b, scale = uniform(r, weight.fan_in, bound=of_a), uniform(weight.fan_out, r, bound=of_b), self.alpha / r
        return Shifted(a, b, -scale * (b @ a), scale=scale, dropout=self.dropout)

    def rules(self) -> list[Rule]:
        return [Switching(self)]

    def count(self, weight: Weight) -> int:
        return self._rank(weight) * (weight.fan_in + weight.fan_out)


def bounds(fan_in: int, fan_out: int, rank: int) -> tuple[float, float]:
    """Largest values of A and of B at the start: sqrt 3 times the paper's deviations, whose gain is 1 / sqrt 3."""
    gain = math.sqrt(3) * math.sqrt(1 / math.sqrt(3))
    of_a = (math.sqrt(fan_out) * rank / fan_in**1.5) ** 0.25
    return gain * of_a, gain * (rank / math.sqrt(fan_in * fan_out)) ** 0.25


class Switching(Rule):
    """Exchanges vectors and makes the Adam step.

    Both factors are held as `... rank x width` here, B as its transpose.

    Attributes:
        sides: by factor's name: `pool` (slot to vector, `... width`, CPU; missing ones are still to be drawn), `slots`
            (where each vector in use belongs in it), `next` (pool's and factor's pointers), and Adam's state, vector by
            vector.
    """

    memory = ("sides", "generator")

    def __init__(self, method: SwitchLoRA) -> None:
        self.method = method
        self.sides: dict[str, row_adam.State] = {}
        self.generator = torch.Generator("cpu")

    def attached(self, run: Run) -> None:
        self.generator.manual_seed(run.seed * 1_000_003 + self.method.seed)
        self.sides = {}
        for name, factors in ((name, vectors(part)) for name, part in run.tuned.of_kind(Shifted)):
            rank, size = factors["a"].shape[-2], min(factor.shape[-1] for factor in factors.values())
            for key, factor in factors.items():
                self.sides[f"{name}.{key}"] = {
                    "pool": {},
                    "slots": list(range(size - rank, size)),
                    "next": [0, 0 if key == "a" else rank // 2],
                    **row_adam.fresh(factor),
                }

    def rate(self, rank: int, run: Run) -> float:
        """Expected number of switches of one factor at this step."""
        return rank / self.method.interval * 0.3 ** ((run.step + 1) / (self.method.decay * max(run.total_steps, 1)))

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        groups, switched = run.settings(), 0
        for name, part in run.tuned.of_kind(Shifted):
            factors = vectors(part)
            for key, partner in ("ab", "ba"):
                switched += self._switch(f"{name}.{key}", f"{name}.{partner}", factors, part, run)
            for key, factor in factors.items():
                parameter = part.get_parameter(key)
                if parameter.grad is not None:
                    gradient = parameter.grad if key == "a" else parameter.grad.mT
                    row_adam.step(self.sides[f"{name}.{key}"], factor, gradient, groups[id(parameter)])
                    parameter.grad = None  # the optimizer passes over what has no gradient
        run.record("switchlora.switched", switched)

    def _switch(self, name: str, partner: str, factors: dict[str, Tensor], part: Any, run: Run) -> int:
        """Exchange vectors of one factor while the other's stand still; how many. None if the pool is all in use."""
        side, other, key = self.sides[name], self.sides[partner], name[-1]
        rank, widths = len(side["slots"]), [factor.shape[-1] for factor in factors.values()]
        size = min(widths)
        bound = dict(zip(factors, bounds(widths[0], widths[1], rank), strict=True))[key]
        expected = self.rate(rank, run)
        wanted = int(expected) + int(float(torch.rand((), generator=self.generator)) < expected - int(expected))
        wanted = min(wanted, rank) if rank < size else 0
        candidate, first = side["next"]
        rows: list[int] = []
        for k in ((first + i) % rank for i in range(wanted)):
            if side["still"][k] or other["still"][k]:
                break
            rows.append(k)
        for k in rows:
            while candidate in side["slots"]:  # of two rows with one slot, one would be lost in the pool
                candidate = (candidate + 1) % size
            vector, old = factors[key][..., k, :], factors[key][..., k, :].clone()
            side["pool"][side["slots"][k]] = old.cpu()
            fresh = side["pool"].pop(candidate, None)
            vector.copy_(self._drawn(old.shape, bound) if fresh is None else fresh)
            side["slots"][k], candidate = candidate, (candidate + 1) % size
            held, change = factors[partner[-1]][..., k, :], old - vector
            left, right = (held, change) if key == "a" else (change, held)
            part.shift.add_(left.unsqueeze(-1) * right.unsqueeze(-2), alpha=setting(part, "scale"))
            row_adam.rest(other, k, self.method.still)
        side["next"] = [candidate, (first + len(rows)) % rank]
        return len(rows)

    def _drawn(self, shape: torch.Size, bound: float) -> Tensor:
        return torch.rand(shape, generator=self.generator, device="cpu") * 2 * bound - bound

    def finished(self, run: Run) -> None:
        self.sides = {}


def vectors(part: Any) -> dict[str, Tensor]:
    """A part's factors, vectors as rows; fused experts hold theirs stacked along a leading axis."""
    return {"a": part.a.data, "b": part.b.data.mT}
