"""Chain of LoRA, COLA: efficient fine-tuning via residual learning (Xia et al. 2024, arXiv:2401.04151).

W' = W + s sum_t B_t A_t,  one link after the other: train a LoRA for its share of the steps, tie a knot (it becomes a
constant), draw a new one with B = 0, drop the optimizer's state, begin the learning rate anew, repeat.
Finished links stand beside the base instead of in it: room for all is there from the start, so memory is the same at
every link, the base is untouched, and the result is an ordinary LoRA of rank `links * rank`. The authors publish no
code; knots are equally spaced unless given, and the restarted rate rises to the run's peak and falls linearly to zero
within every link. `ranks` gives every link its own, falling as the residual shrinks; s is the first link's for all.
Dropout is for the link that trains; the finished ones read the whole input, as the weight does.
Use it when LoRA's rank is too small and a higher one does not fit the optimizer.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.moments import cut, refuse_sharing
from ...core.operators.chain import Chain
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...core.rule import Rule, Run
from ...core.schedules import Links, rise
from ...model.weights import Weight

FALLING = "a list of whole numbers of at least 1, none above the one before, or none"
RISING = "a list of whole numbers of at least 1, each above the one before, or none"


def _whole(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and bool(values) and all(type(v) is int and v >= 1 for v in values)


def _falling(ranks: Any) -> bool:
    return ranks is None or (_whole(ranks) and list(ranks) == sorted(ranks, reverse=True))


def _rising(steps: Any) -> bool:
    return steps is None or (_whole(steps) and list(steps) == sorted(set(steps)))


@method("cola_chain", paper="2401.04151", family="lowrank")
class ColaChain(WeightMethod):
    """A chain of LoRAs; trains `rank * (in + out)` values a layer at a time, `links` times."""

    default_lr = 5e-4
    everywhere = ("links", "knots", "restart", "warmup")
    only = (("warmup", "restart", (True,)),)

    rank: int = fields.positive(8, "inner dimension r of every link")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    links: int = fields.positive(2, "M, length of the chain; 1 is LoRA")
    ranks: Any = fields.declared(None, "falling ranks of the links, instead of rank and links", FALLING, _falling)
    knots: Any = fields.declared(None, "steps after which links end, the last one's left out", RISING, _rising)
    restart: bool = fields.flag(True, "begin the learning rate anew with every link; else the run's schedule goes on")
    warmup: float = fields.fraction(0.0, "share of every link's steps in which its learning rate rises")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None and self.links not in (type(self).links, len(self.ranks)):
            raise ValueError(f"cola_chain: links={self.links} and {len(self.ranks)} ranks are given; give ranks alone")
        number = len(self.chain)
        if self.knots is not None and len(self.knots) != number - 1:
            raise ValueError(
                f"cola_chain: knots={list(self.knots)} are {len(self.knots)}; {number} links have {number - 1} knots"
            )
        for pattern, settings in self.overrides.items():
            if "rank" in settings and self.ranks is not None:
                raise ValueError(f"cola_chain: overrides[{pattern!r}] has rank, but ranks are given; override these")
            own = len(replace(self, overrides={}, knots=None, **settings).chain)
            if own != number:
                raise ValueError(f"cola_chain: overrides[{pattern!r}] has {own} links; all places have {number}")

    @property
    def chain(self) -> list[int]:
        """The rank of every link."""
        return list(self.ranks) if self.ranks is not None else [self.rank] * self.links

    def delta(self, weight: Weight) -> LowRank:
        r, past = self.chain[0], sum(self.chain[:-1])
        a, b = kaiming(r, weight.fan_in), zeros(weight.fan_out, r)
        settings: dict[str, Any] = {"scale": self.alpha / r, "dropout": self.dropout}
        if not past:
            return LowRank(a, b, **settings)
        kind = Chain if self.dropout else LowRank
        return kind(a, b, a0=zeros(past, weight.fan_in), b0=zeros(weight.fan_out, past), **settings)

    def rules(self) -> list[Rule]:
        return [Knots(self)] if len(self.chain) > 1 else []

    def count(self, weight: Weight) -> int:
        return self.chain[0] * (weight.fan_in + weight.fan_out)


class Knots(Links):
    """Ties the knots: after every `1 / links` of the steps, or where they are given.

    Args:
        method: the chain; its ranks may differ from place to place, the number of its links does not.
    """

    def __init__(self, method: ColaChain) -> None:
        super().__init__()
        self.method, self.links = method, len(method.chain)

    def attached(self, run: Run) -> None:
        if self.method.knots is not None and self.method.knots[-1] >= run.total_steps:
            raise ValueError(
                f"cola_chain: knots={list(self.method.knots)}; all must be below the run's {run.total_steps} steps"
            )
        if run.total_steps < self.links:
            raise ValueError(f"cola_chain: links={self.links} need as many steps, the run has {run.total_steps}")
        if any(getattr(part, "a0", None) is None for _, part in run.tuned.of_kind(LowRank, Chain)):
            raise ValueError("cola_chain: its finished links are in the base; attach a new chain to that")
        if any(len(set(self._ranks(name))) > 1 for name, _ in run.tuned.of_kind(LowRank, Chain)):
            refuse_sharing("cola_chain with falling ranks")

    def _ranks(self, name: str) -> list[int]:
        """Of the links of a part."""
        here = self.method.at(name.rpartition(".")[0])
        assert isinstance(here, ColaChain)
        return here.chain

    def ends(self, run: Run) -> list[int]:
        return list(self.method.knots or (run.total_steps * k // self.links for k in range(1, self.links)))

    def rate(self, group: dict[str, Any], done: int, length: int) -> float:
        if not self.method.restart:
            return group["lr"]
        warm = int(self.method.warmup * length)
        return group.get("initial_lr", group["lr"]) * min(rise(done, warm), 1 - (done - warm) / (length - warm))

    def tie(self, run: Run) -> Iterator[nn.Parameter]:
        generator = torch.Generator().manual_seed(run.seed * 1000 + self.tied)
        for name, part in run.tuned.of_kind(LowRank, Chain):
            a, b, a0, b0 = (part.get_parameter(key) for key in ("a", "b", "a0", "b0"))
            ranks = self._ranks(name)
            place = slice(sum(ranks[: self.tied]), sum(ranks[: self.tied + 1]))
            a0[..., place, :] = a
            b0[..., place] = -b  # what a LowRank holds beside its factors is subtracted
            self._narrow(part, ranks[self.tied + 1])
            a.copy_(kaiming(*a.shape, generator=generator))
            b.zero_()
            yield from (a, b)

    def resumed(self, run: Run) -> None:
        for name, part in run.tuned.of_kind(LowRank, Chain):
            self._narrow(part, self._ranks(name)[self.tied])

    def _narrow(self, part: nn.Module, rank: int) -> None:
        """Leave room for a smaller rank; values and state of what is left do not matter, a new link begins."""
        cut(part.get_parameter("a"), rank, -2)
        cut(part.get_parameter("b"), rank, -1)
