"""NeFT: let's focus on neuron, neuron-level supervised fine-tuning (Xu et al. 2024, arXiv:2403.11621).

A neuron is a row of the up projection ("in") or a column of the down projection ("out"). A probe fine-tunes the whole
base for a few steps; S = cos(w_base, w_probe) for every neuron; the N neurons of lowest S, over all blocks and both
sides together, are trained from the ORIGINAL weights: W'[n] = W[n] + D[n],  D = 0. Everything else stays.
As in the official code, S is signed and computed in float32, and gates take part only if asked.
Use it when a task needs more than low rank but may touch few neurons: the selection itself says where the task lives.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...core import fields
from ...core.init import zeros
from ...core.method import Batches, Method, Placed, label, weight_at
from ...core.operators.neurons import Neurons
from ...core.part import Shared
from ...core.places import evenly
from ...core.registry import method
from ...core.tuned import base_size
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight
from ...statistics import cosines, probe

IN, OUT, GATE = ["mlp.up", "expert.up"], ["mlp.down", "expert.down"], ["mlp.gate", "expert.gate"]


@method("neft", paper="2403.11621", family="sparse")
class NeFT(Method):
    """Chosen feed-forward neurons; trains `N * width` values, N by `share` or `neurons`."""

    needs_data = True
    default_lr = 2e-5
    refuses = ("mamba",)

    share: float = fields.number(0.03, "trained values as part of all the base's; paper: 0.03 to 0.09", above=0, high=1)
    neurons: int | None = fields.whole(None, "N, number of neurons, instead of a share", low=1, optional=True)
    gate: bool = fields.flag(False, "rows of the gate projection may be chosen as well")
    probe_steps: int = fields.positive(100, "steps of the probe, one batch each; 800 did as well as a full run")
    probe_lr: float = fields.number(2e-5, "learning rate of the probe", above=0)

    def measure(self, base: Anatomy, batches: Batches) -> dict[Site, Tensor]:
        """The chosen neurons of every site that has any: indices as `Neurons` counts them, ascending."""
        sites = self._sites(base)

        def read(pristine: Mapping[str, Tensor]) -> list[Tensor]:
            return [self._scores(weight_at(base.model, site), site, pristine) for site in sites]

        scores = probe(base.model, batches, read, steps=self.probe_steps, lr=self.probe_lr)
        flat = torch.cat(scores)
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[flat.sort(stable=True).indices[: min(self._wanted(base, sites), len(flat))]] = True
        parts = chosen.split([len(one) for one in scores])
        return {site: part.nonzero().flatten() for site, part in zip(sites, parts, strict=True) if part.any()}

    def assumed(self, base: Anatomy) -> dict[Site, Tensor]:
        sites = self._sites(base)
        shapes = [weight_at(base.model, site).shape for site in sites]
        sizes = [math.prod(s[:-2]) * s[-1 if _is_out(site) else -2] for s, site in zip(shapes, sites, strict=True)]
        chosen = zip(sites, evenly(sizes, self._wanted(base, sites)), strict=True)
        return {site: index for site, index in chosen if len(index)}

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: dict[Site, Tensor]) -> Iterator[Placed]:
        for site, index in measured.items():
            weight, columns = weight_at(base.model, site), _is_out(site)
            length, size = (weight.fan_out, weight.fan_in) if columns else (weight.fan_in, weight.fan_out)
            yield Placed(site, Neurons(zeros(len(index), length), index, size, columns, weight.experts), label(site))

    def _sites(self, base: Anatomy) -> list[Site]:
        roles = set(IN + OUT + (GATE if self.gate else []))
        # A part of a fused projection has the role that the whole does not.
        sites = [site for site in base.sites if site.role in roles and site.parameter is not None]
        if not sites:
            raise ValueError(f"neft: {type(base.model).__name__} has no feed-forward part with up and down projections")
        return sites

    def _scores(self, weight: Weight, site: Site, pristine: Mapping[str, Tensor]) -> Tensor:
        now = weight.matrix()
        before = weight.canonical(pristine[f"{site.path}.{site.parameter}"].to(now.device))
        if weight.rows is not None:
            before = before.index_select(-2, weight.index())
        if _is_out(site):
            now, before = now.mT, before.mT
        return cosines(before.flatten(0, -2), now.flatten(0, -2)).cpu()

    def _wanted(self, base: Anatomy, sites: list[Site]) -> int:
        if self.neurons is not None:
            return self.neurons
        weight = weight_at(base.model, sites[0])
        length = weight.fan_out if _is_out(sites[0]) else weight.fan_in
        return max(1, round(self.share * base_size(base.model) / length))


def _is_out(site: Site) -> bool:
    return site.role in OUT
