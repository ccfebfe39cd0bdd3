"""DSEE: dually sparsity-embedded efficient tuning (Chen et al. 2021, arXiv:2111.00160).

W' = m W + s (B A + S),  s = alpha / rank,  A ~ N(0, 0.02^2), B = 0, S zero but for N entries. Those are the largest of
what a rank-one decomposition leaves of the pretrained W (two rounds of GreBsmo). A, B and S train while m = 1; after
the share `first` of the run the base is pruned and they train on. Entries: the share `ratio` of least magnitude goes
(0.2 in the authors' scripts, with N = 16, rates of 2e-4 to 6e-4 and 5 to 10 epochs a phase), over queries and values
together (by |W|, |W + s B A|, or with S as well: `score`), and over all other linear layers together. Heads: in every
layer as many as `ratio` says (3 of 12 in the code), those with the least sum of these magnitudes over their rows of
query and value. Coefficients, as in the paper: heads and neurons are multiplied by trained ones under an L1 penalty;
those of least magnitude go in every layer, and the others then stay as they are. `core.shrinking` makes the layers
smaller by what went. The base itself stays as it is. As in the code one scale is for both terms (which there misses S
in places). Merging fills pruned entries with the change; `inside=True` keeps them zero by masking the change as well.
Use it to get a smaller or sparser model and its adaptation in one run.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.importance import lowest
from ...core.init import normal, zeros
from ...core.method import Method, Placed, label, weight_at
from ...core.operators.low_rank_sparse import outliers
from ...core.operators.pruned_weight import Coefficients, Pruned, PrunedLowRankSparse
from ...core.part import Shared
from ...core.places import pieces
from ...core.registry import method
from ...core.rule import Rule, Run, pooled
from ...core.shrinking import head_masks, heads, neuron_masks, neurons
from ...core.tuned import Tuned
from ...model.anatomy import Anatomy, Site, describe
from ...model.weights import Weight

TRAINED = ("attention.query", "attention.value")
UNITS = ("attention.output", "mlp.down")


@method("dsee", paper="2111.00160", family="structured")
class DSEE(Method):
    """Low rank and sparse on a base that is pruned; trains `rank * (in + out) + entries` values a layer."""

    overridable = False
    refuses = ("mamba",)
    default_lr = 5e-4
    only = (("neurons", "prune", ("coefficients",)), ("l1", "prune", ("coefficients",)),
            ("score", "prune", ("entries", "heads")))  # fmt: skip

    on: Any = fields.sites(list(TRAINED))
    rank: int = fields.positive(16, "inner dimension r")
    alpha: float = fields.number(32.0, "numerator of the scale alpha / rank", above=0)
    entries: int = fields.positive(64, "N, entries of S that train")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the low-rank branch")
    prune: str = fields.choice("entries", ("entries", "heads", "coefficients", "nothing"), "what goes")
    ratio: float = fields.number(0.2, "share of entries or heads that goes; in the paper up to 0.5", low=0, high=1)
    neurons: float = fields.number(0.4, "share of the neurons that goes; coefficients only", low=0, high=1)
    l1: float = fields.number(1e-4, "weight of the coefficients' sum of magnitudes; coefficients only", low=0)
    first: float = fields.number(0.5, "time before pruning: below 1 a share of the run, else steps", low=0)
    score: str = fields.choice("WABS", ("W", "WAB", "WABS"), "whose magnitudes count where a change trains")
    inside: bool = fields.flag(False, "mask the change as well, so that merging keeps what is pruned at zero")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        trained = base.select(self.on, what="weight")
        for site in pieces(base, trained):
            weight = weight_at(base.model, site)
            if site in trained and weight.experts:
                raise ValueError(f"dsee: {site.name} holds {weight.experts} experts in one tensor; leave it out of on")
            if site in trained:
                yield Placed(site, self.delta(weight), label(site))
            elif self.prune == "nothing" or site.kind != "linear":
                continue
            elif self.prune == "coefficients" and site.role in UNITS and site.block is not None:
                found = heads(base, base.blocks[site.block])
                units = weight.fan_in if site.role == UNITS[1] else found.units if found is not None else 1
                yield Placed(site, Coefficients(torch.ones(units), width=weight.fan_in // units), label(site))
            else:
                yield Placed(site, Pruned(weight.fan_out, weight.fan_in), label(site))

    def delta(self, weight: Weight) -> PrunedLowRankSparse:
        """The change of one weight; S has its places from the pretrained values."""
        a, b = normal(self.rank, weight.fan_in, std=0.02), zeros(weight.fan_out, self.rank)
        index = outliers(weight.matrix().float(), min(self.entries, weight.fan_out * weight.fan_in))
        return PrunedLowRankSparse(a, b, zeros(len(index)), index, self.alpha / self.rank, self.dropout, self.inside)

    def rules(self) -> list[Rule]:
        return [] if self.prune == "nothing" else [Pruning(self)]

    def count(self, weight: Weight) -> int:
        """The paper's formula for the number of trained values at one `out x in` weight that trains."""
        return self.rank * (weight.fan_in + weight.fan_out) + min(self.entries, weight.fan_in * weight.fan_out)


class Pruning(Rule):
    """Prunes once; from then on the masks are in the parts, and nothing changes them."""

    def __init__(self, method: DSEE) -> None:
        self.method = method

    def time(self, run: Run) -> int:
        """The step after which the base is pruned."""
        return max(1, run.steps(self.method.first))

    def attached(self, run: Run) -> None:
        first, steps = self.time(run), run.total_steps
        if first >= steps > 0:
            raise ValueError(f"dsee: first takes {first} of the run's {steps} steps; leave some to train what is left")

    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        if run.step != self.time(run):
            return
        parts = dict(run.tuned.of_kind(Pruned, PrunedLowRankSparse))
        if self.method.prune == "entries":
            masks = self._entries(run.tuned, parts)
        else:
            of_units = self._heads if self.method.prune == "heads" else self._coefficients
            stays = dict(of_units(run.tuned, describe(run.tuned.model)))
            found = {name: part.site for name, part in parts.items() if part.site in stays}
            masks = {n: stays[site].expand(weight_at(run.tuned.model, site).shape) for n, site in found.items()}
        for name, mask in masks.items():
            parts[name].prune(mask)
        run.record("pruned", {name: 1 - float(mask.float().mean()) for name, mask in masks.items()})

    def _magnitude(self, tuned: Tuned, part: Any) -> Tensor:
        """Magnitudes of a weight's entries, of the change as well where there is one and it counts."""
        w = weight_at(tuned.model, part.site).matrix().float()
        if isinstance(part, PrunedLowRankSparse) and self.method.score != "W":
            w = w + (part.dense() if self.method.score == "WABS" else part.scale * part.b @ part.a).to(w)
        return w.abs()

    def _entries(self, tuned: Tuned, parts: dict[str, Any]) -> dict[str, Tensor]:
        """What stays, over two pools: the weights that train, and the others."""
        masks = {}
        for kind in (PrunedLowRankSparse, Pruned):
            pool = {name: part for name, part in parts.items() if isinstance(part, kind)}
            scores = {name: self._magnitude(tuned, part) for name, part in pool.items()}
            size = sum(score.numel() for score in scores.values())
            masks |= {name: ~out for name, out in lowest(scores, round(self.method.ratio * size)).items()}
        return masks

    def _heads(self, tuned: Tuned, base: Anatomy) -> Iterator[tuple[Site, Tensor]]:
        """What stays when every layer loses its heads of least magnitude."""
        parts = {part.site: part for _, part in tuned.of_kind(Pruned, PrunedLowRankSparse)}
        for found in (heads(base, block) for block in base.blocks):
            if found is not None:
                scores = torch.zeros(found.units)
                for site in (found.sites["query"], found.sites["value"]):
                    if site in parts:
                        rows = self._magnitude(tuned, parts[site]).sum(-1).cpu()
                        scores += rows.view(found.units, -1).sum(-1)
                yield from head_masks(found, weakest(scores, self.method.ratio))

    def _coefficients(self, tuned: Tuned, base: Anatomy) -> Iterator[tuple[Site, Tensor]]:
        """What stays when every layer loses its heads and neurons of least coefficient; these are zeroed as well."""
        for _, part in tuned.of_kind(Coefficients):
            block, of_heads = base.blocks[part.site.block], part.site.role == UNITS[0]
            gone = weakest(part.c.abs(), self.method.ratio if of_heads else self.method.neurons)
            part.stays[gone] = 0
            found = heads(base, block) if of_heads else None
            if found is not None:
                yield from head_masks(found, gone)
            elif not of_heads:
                yield from neuron_masks(neurons(base, block), part.stays.bool())

    def gradients(self, run: Run) -> None:
        if run.step >= self.time(run):
            for _, part in run.tuned.of_kind(Coefficients):
                part.c.grad = None  # the optimizer passes over what has no gradient

    def penalty(self, run: Run) -> Tensor | None:
        every = [part.c.abs().sum() for _, part in run.tuned.of_kind(Coefficients)]
        counts = every and self.method.l1 and run.step < self.time(run)
        return self.method.l1 * pooled(every).sum() if counts else None


def weakest(scores: Tensor, share: float) -> list[int]:
    """The units of least score, this share of them."""
    return scores.argsort(stable=True)[: round(share * len(scores))].tolist()
