"""DSEE: dually sparsity-embedded efficient tuning (Chen et al. 2021, arXiv:2111.00160).

W' = m W + s (B A + S),  s = alpha / rank,  A ~ N(0, 0.02^2), B = 0, S zero but for N entries. Those are the largest of
what a rank-one decomposition leaves of the pretrained W (two rounds of GreBsmo). A, B and S train while m = 1; after
the share `first` of the run the base is pruned and they train on. Entries: the share `ratio` of least magnitude goes,
over queries and values together (by |W|, or |W + s B A|, or with S as well), and over all other linear layers together.
Heads: in every layer as many as `ratio` says, those with the least sum of magnitudes over their rows of query and
value, changes included, as in the code. Coefficients, as in the paper: every head and every neuron is multiplied by a
trained one under an L1 penalty; those of least magnitude go in every layer, and what is left stays as it then is.
`core.shrinking` makes the layers smaller by what went. The base itself stays as it is.
As in the code one scale is for both terms (which there misses S in places). Merging fills pruned entries with the
change; `inside=True` keeps them zero by masking the change as well.
Use it to get a smaller or sparser model and its adaptation in one run.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.init import normal, zeros
from ...core.method import Method, Placed, label, weight_at
from ...core.operators.low_rank_sparse import outliers
from ...core.operators.pruned_weight import Coefficients, Pruned, PrunedLowRankSparse
from ...core.part import Shared
from ...core.registry import method
from ...core.rule import Rule, Run
from ...core.shrinking import head_masks, heads, neurons
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

    on: Any = fields.sites(list(TRAINED))
    rank: int = fields.positive(16, "inner dimension r")
    alpha: float = fields.number(32.0, "numerator of the scale alpha / rank", above=0)
    entries: int = fields.positive(64, "N, entries of S that train")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the low-rank branch")
    prune: str = fields.choice("entries", ("entries", "heads", "coefficients", "nothing"), "what goes")
    ratio: float = fields.number(
        0.2, "share of the entries, or of the heads, that goes; 0.2 as in the authors' scripts, the paper up to 0.5",
        low=0, high=1,
    )  # fmt: skip
    neurons: float = fields.number(0.4, "share of the neurons that goes; coefficients only", low=0, high=1)
    l1: float = fields.number(1e-4, "weight of the coefficients' sum of magnitudes; coefficients only", low=0)
    first: float = fields.number(0.5, "time before pruning: below 1 a share of the run, else steps", low=0)
    score: str = fields.choice("WABS", ("W", "WAB", "WABS"), "whose magnitudes count where a change trains")
    inside: bool = fields.flag(False, "mask the change as well, so that merging keeps what is pruned at zero")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        trained = base.select(self.on, what="weight")
        for site in sites(base, trained):
            weight = weight_at(base.model, site)
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


def sites(base: Anatomy, trained: list[Site]) -> list[Site]:
    """Every linear layer; of a fused one that trains in part, its parts."""
    partly = {(site.path, site.parameter) for site in trained if site.part is not None}
    whole = [site for site in base.select("all", what="weight") if (site.path, site.parameter) not in partly]
    parts = [site for site in base.sites if site.part is not None and (site.path, site.parameter) in partly]
    found = dict.fromkeys([*whole, *parts, *trained])
    order = {site: index for index, site in enumerate(base.sites)}
    return sorted(found, key=lambda site: order.get(site, len(order)))


class Pruning(Rule):
    """Prunes once; from then on the masks are in the parts, and nothing changes them."""

    def __init__(self, method: DSEE) -> None:
        self.method = method

    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        if run.step != max(1, run.steps(self.method.first)):
            return
        parts = dict(pruned(run.tuned))
        scored = {"entries": self._entries, "heads": self._heads, "coefficients": self._coefficients}
        masks = scored[self.method.prune](run.tuned, parts)
        for name, mask in masks.items():
            parts[name].prune(mask)
        zeros = {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}
        run.record("pruned", zeros)

    def _magnitude(self, tuned: Tuned, part: Any, score: str) -> Tensor:
        """Magnitudes of a weight's entries, of the change as well where there is one and it counts."""
        w = weight_at(tuned.model, part.site).matrix().float()
        if isinstance(part, PrunedLowRankSparse) and score != "W":
            w = w + (part.dense() if score == "WABS" else part.scale * part.b @ part.a).to(w)
        return w.abs()

    def _entries(self, tuned: Tuned, parts: dict[str, Any]) -> dict[str, Tensor]:
        """What stays, over two pools: the weights that train, and the others."""
        masks = {}
        for kind in (PrunedLowRankSparse, Pruned):
            pool = [name for name, part in parts.items() if isinstance(part, kind)]
            scores = [self._magnitude(tuned, parts[name], self.method.score) for name in pool]
            flat = torch.cat([score.flatten().cpu() for score in scores]) if pool else torch.empty(0)
            stays = torch.ones(len(flat), dtype=torch.bool)
            stays[flat.argsort(stable=True)[: round(self.method.ratio * len(flat))]] = False
            split = stays.split([score.numel() for score in scores])
            for name, score, own in zip(pool, scores, split, strict=True):
                masks[name] = own.view_as(score).to(score.device)
        return masks

    def _heads(self, tuned: Tuned, parts: dict[str, Any]) -> dict[str, Tensor]:
        """What stays when every layer loses its heads of least magnitude."""
        base, masks = describe(tuned.model), {}
        for block in base.blocks:
            found = heads(base, block)
            if found is None:
                continue
            scores = torch.zeros(found.units)
            for part in parts.values():
                if part.site in (found.sites["query"], found.sites["value"]):
                    rows = self._magnitude(tuned, part, "WABS").sum(-1).cpu()
                    scores += rows.view(found.units, -1).sum(-1)
            gone = scores.argsort(stable=True)[: round(self.method.ratio * found.units)].tolist()
            masks |= self._spread(tuned, parts, dict(head_masks(found, gone)))
        return masks

    def _coefficients(self, tuned: Tuned, parts: dict[str, Any]) -> dict[str, Tensor]:
        """What stays when every layer loses its heads and neurons of least coefficient; these are zeroed as well."""
        base, masks = describe(tuned.model), {}
        for part in (part for part in tuned.parts() if isinstance(part, Coefficients)):
            assert part.site.block is not None
            block, of_heads = base.blocks[part.site.block], part.site.role == UNITS[0]
            share = self.method.ratio if of_heads else self.method.neurons
            gone = part.c.abs().argsort(stable=True)[: round(share * len(part.c))]
            part.stays[gone] = 0
            found = heads(base, block)
            if of_heads and found is not None:
                masks |= self._spread(tuned, parts, dict(head_masks(found, gone.tolist())))
            elif not of_heads:
                rows = part.stays.bool().unsqueeze(1)
                masks |= self._spread(tuned, parts, dict.fromkeys(neurons(base, block).values(), rows))
        return masks

    def _spread(self, tuned: Tuned, parts: dict[str, Any], masks: dict[Site, Tensor]) -> dict[str, Tensor]:
        """Masks of rows or columns as masks of entries, of the parts that can be pruned, by name."""
        names = {part.site: name for name, part in parts.items() if part.site in masks}
        return {name: masks[site].expand(weight_at(tuned.model, site).shape) for site, name in names.items()}

    def gradients(self, run: Run) -> None:
        if run.step >= max(1, run.steps(self.method.first)):
            for part in run.tuned.parts():
                if isinstance(part, Coefficients):
                    part.c.grad = None  # the optimizer passes over what has no gradient

    def penalty(self, run: Run) -> Tensor | None:
        every = [part.c.abs().sum() for part in run.tuned.parts() if isinstance(part, Coefficients)]
        if not every or not self.method.l1 or run.step >= max(1, run.steps(self.method.first)):
            return None
        return self.method.l1 * torch.stack([one.to(every[0].device) for one in every]).sum()


def pruned(tuned: Tuned) -> Iterator[tuple[str, Any]]:
    """Name and part of every weight that may be pruned."""
    return ((name, part) for name, part in tuned.named_parts() if isinstance(part, (Pruned, PrunedLowRankSparse)))
