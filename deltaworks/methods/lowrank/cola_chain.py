"""Chain of LoRA, COLA: efficient fine-tuning via residual learning (Xia et al. 2024, arXiv:2401.04151).

W' = W + s sum_t B_t A_t,  one link after the other: train a LoRA for its share of the steps, tie a knot (it becomes a
constant), draw a new one with B = 0, drop the optimizer's state, begin the learning rate anew, repeat.
Finished links stand beside the base instead of in it: room for all is there from the start, so memory is the same at
every link, the base is untouched, and the result is an ordinary LoRA of rank `links * rank`. The authors publish no
code; knots are equally spaced, and the restarted rate falls linearly from the run's peak within every link. `ranks`
gives every link its own, falling as the residual shrinks; s is the first link's for all. Dropout is for the link that
trains; the finished ones read the whole input, as the weight does.
Use it when LoRA's rank is too small and a higher one does not fit the optimizer.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.moments import refuse_sharing, replace_value, restart
from ...core.operators.chain import Chain
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight

FALLING = "a list of whole numbers of at least 1, none above the one before, or none"


def _falling(ranks: Any) -> bool:
    good = isinstance(ranks, (list, tuple)) and ranks and all(type(rank) is int and rank >= 1 for rank in ranks)
    return ranks is None or bool(good and list(ranks) == sorted(ranks, reverse=True))


@method("cola_chain", paper="2401.04151", family="lowrank")
class ColaChain(WeightMethod):
    """A chain of LoRAs; trains `rank * (in + out)` values a layer at a time, `links` times."""

    default_lr = 5e-4
    everywhere = ("links", "restart")

    rank: int = fields.positive(8, "inner dimension r of every link")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    links: int = fields.positive(2, "M, length of the chain; 1 is LoRA")
    ranks: Any = fields.declared(None, "falling ranks of the links, instead of rank and links", FALLING, _falling)
    restart: bool = fields.flag(True, "begin the learning rate anew with every link; else the run's schedule goes on")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None and self.links not in (type(self).links, len(self.ranks)):
            raise ValueError(f"cola_chain: links={self.links} and {len(self.ranks)} ranks are given; give ranks alone")
        for pattern, settings in self.overrides.items():
            if "rank" in settings and self.ranks is not None:
                raise ValueError(f"cola_chain: overrides[{pattern!r}] has rank, but ranks are given; override these")
            own = replace(self, overrides={}, **settings).chain
            if len(own) != len(self.chain):
                raise ValueError(
                    f"cola_chain: overrides[{pattern!r}] has {len(own)} links; all places have {len(self.chain)}"
                )

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


class Knots(Rule):
    """Ties a knot after every `1 / links` of the steps.

    Args:
        method: the chain; its ranks may differ from place to place, the number of its links does not.

    Attributes:
        tied: number of finished links.
    """

    memory = ("tied",)

    def __init__(self, method: ColaChain) -> None:
        self.method, self.links, self.tied = method, len(method.chain), 0
        self._rates: list[float] | None = None

    def attached(self, run: Run) -> None:
        if run.total_steps < self.links:
            raise ValueError(f"cola_chain: links={self.links} need as many steps, the run has {run.total_steps}")
        if any(len(set(self._ranks(name))) > 1 for name, _ in run.tuned.of_kind(LowRank, Chain)):
            refuse_sharing("cola_chain with falling ranks")

    def _ranks(self, name: str) -> list[int]:
        """Of the links of a part."""
        here = self.method.at(name.rpartition(".")[0])
        assert isinstance(here, ColaChain)
        return here.chain

    def ends(self, run: Run) -> list[int]:
        """The steps after which links are complete."""
        return [run.total_steps * (k + 1) // self.links for k in range(self.links)]

    def gradients(self, run: Run) -> None:
        if self.method.restart and run.optimizer is not None:
            ends = [0, *self.ends(run)]
            begin, end = ends[self.tied], ends[self.tied + 1]
            left = 1 - (run.step - begin) / (end - begin)
            self._rates = [group["lr"] for group in run.optimizer.param_groups]
            for group in run.optimizer.param_groups:
                group["lr"] = group.get("initial_lr", group["lr"]) * left

    def step_end(self, run: Run) -> None:
        if self._rates is not None and run.optimizer is not None:
            for group, rate in zip(run.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None
        if run.step in self.ends(run)[:-1] and self.tied < self.links - 1:
            self._tie(run)
            run.record("cola_chain.knots", self.tied)

    @torch.no_grad()
    def _tie(self, run: Run) -> None:
        generator = torch.Generator().manual_seed(run.seed * 1000 + self.tied)
        for name, part in run.tuned.of_kind(LowRank, Chain):
            a, b, a0, b0 = (part.get_parameter(key) for key in ("a", "b", "a0", "b0"))
            ranks = self._ranks(name)
            place = slice(sum(ranks[: self.tied]), sum(ranks[: self.tied + 1]))
            a0[..., place, :] = a
            b0[..., place] = -b  # what a LowRank holds beside its factors is subtracted
            narrow(a, b, ranks[self.tied + 1])
            a.copy_(kaiming(*a.shape, generator=generator))
            b.zero_()
            for parameter in (a, b):
                restart(parameter, run.optimizer)
        self.tied += 1

    def resumed(self, run: Run) -> None:
        for name, part in run.tuned.of_kind(LowRank, Chain):
            narrow(part.get_parameter("a"), part.get_parameter("b"), self._ranks(name)[self.tied])


def narrow(a: nn.Parameter, b: nn.Parameter, rank: int) -> None:
    """Leave room for a smaller rank; values and state of what is left do not matter, a new link begins."""
    if a.shape[-2] > rank:
        replace_value(a, a.detach()[..., :rank, :].contiguous())
        replace_value(b, b.detach()[..., :rank].contiguous())
