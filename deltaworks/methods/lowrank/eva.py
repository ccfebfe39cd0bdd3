"""EVA: one initialization to rule them all, explained variance adaptation (Paischer et al. 2024, arXiv:2410.07170).

W' = W + s B A,  A = the first r_l principal directions of what layer l reads,  B = 0,  s = alpha / rank at every layer.
The ranks r_l share a budget of `rank` a layer: all directions of all layers compete by the share of their layer's
variance that they explain, at most `rho * rank` a layer; a layer that gets none stays as it is.
`peft` and the official code approach the directions batch by batch until they stand still; here the covariance over all
given batches is exact, which is their limit, and layers that read the same values are measured once. Inputs are centred
and shares are of the total variance, as in that code (the paper divides by the sum of singular values).
Use it when a few hundred examples of the task are at hand: it needs no backward pass, and a quantised base will do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.init import ones, zeros
from ...core.method import LINEAR, Batches, Method, Placed, label, weight_at
from ...core.operators.low_rank import LowRank
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy, Site
from ...statistics import same_inputs, second_moments


@dataclass(frozen=True)
class Directions:
    """What a layer reads: principal directions as rows (`k x in`), their singular values and shares of the variance."""

    rows: Tensor
    values: Tensor
    shares: Tensor


@method("eva", paper="2410.07170", family="lowrank")
class EVA(Method):
    """LoRA along the inputs' principal directions; spends a budget of `rank` a layer where the variance is."""

    needs_data = True
    overridable = False
    default_lr = 5e-4
    # What an expert of a fused stack reads, or a weight that is used without its layer, is not to be seen.
    refuses = ("mixtral", "mamba")

    on: Any = fields.sites(LINEAR)
    rank: int = fields.positive(16, "r, average rank of the layers: the budget is this times their number")
    alpha: float = fields.number(1.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    rho: float = fields.number(2.0, "most a layer's rank may be, over `rank`; 1 gives every layer the same", low=1)
    whiten: bool = fields.flag(False, "divide every direction by the root of its singular value")
    answers: bool = fields.flag(False, "measure only tokens that have a label")
    per_pass: int = fields.positive(8, "layers measured at a time: bounds memory, costs passes over the batches")

    def measure(self, base: Anatomy, batches: Batches) -> dict[str, Directions]:
        sites, batches = self._sites(base), list(batches)
        if not batches:
            raise ValueError("eva was given no batch, so there is nothing to measure")
        twin = same_inputs(base.model, list(dict.fromkeys(site.path for site in sites)), batches[0])
        first = list(dict.fromkeys(twin.values()))
        found: dict[str, Directions] = {}
        most = round(self.rho * self.rank)
        for path, moment in second_moments(base.model, first, batches, per_pass=self.per_pass, answers=self.answers):
            variances, columns = moment.principal(most, centred=True)
            total = moment.covariance.trace().clamp(min=torch.finfo(torch.float64).tiny)
            variances = variances.clamp(min=0)
            rows = columns.T.to("cpu", torch.get_default_dtype()).contiguous()
            found[path] = Directions(rows, (variances * moment.count).sqrt().cpu(), (variances / total).cpu())
        return {path: found[twin[path]] for path in twin}

    def assumed(self, base: Anatomy) -> dict[str, Directions]:
        """Equal shares, which spread the ranks evenly."""
        most = round(self.rho * self.rank)
        width = {site.path: weight_at(base.model, site).fan_in for site in self._sites(base)}
        return {path: Directions(zeros(most, n), ones(most), zeros(most)) for path, n in width.items()}

    def _sites(self, base: Anatomy) -> list[Site]:
        sites = list(base.select(self.on, what="weight"))
        for site in sites:
            if site.kind != "linear" or site.parameter != "weight" or not site.called:
                raise ValueError(
                    f"eva cannot see what {site.name} reads; leave it out of on=, which takes linear layers"
                )
        return sites

    def ranks(self, base: Anatomy, sites: list[Site], measured: dict[str, Directions]) -> list[int]:
        """The rank of every site: the budget goes to the largest shares of variance."""
        most = [min(*weight_at(base.model, site).shape, round(self.rho * self.rank)) for site in sites]
        pool = [(-float(measured[s.path].shares[j]), j, i) for i, s in enumerate(sites) for j in range(most[i])]
        ranks = [0] * len(sites)
        for _, _, index in sorted(pool)[: self.rank * len(sites)]:
            ranks[index] += 1
        return ranks

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: dict[str, Directions]) -> Iterator[Placed]:
        sites = list(base.select(self.on, what="weight"))
        for site, rank in zip(sites, self.ranks(base, sites, measured), strict=True):
            if rank:
                found = measured[site.path]
                a = found.rows[:rank].clone()
                if self.whiten:
                    a /= found.values[:rank, None].sqrt().clamp(min=1e-6).to(a)
                b = zeros(weight_at(base.model, site).fan_out, rank)
                yield Placed(site, LowRank(a, b, scale=self.alpha / self.rank, dropout=self.dropout), label(site))
