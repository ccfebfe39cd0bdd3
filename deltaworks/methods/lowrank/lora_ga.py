"""LoRA-GA: low-rank adaptation with gradient approximation (Wang et al. 2024, arXiv:2407.05000).

W' = W + s (B A - B0 A0),  s = alpha / sqrt(rank),  G = U S V^T the gradient of the loss by W, averaged over batches;
A0 = c V_1..r^T,  B0 = c U_r+1..2r,  c = out^(1/4) / sqrt(gamma): the first step of both factors then moves W along the
best rank-2r approximation of G. The start is subtracted beside the untouched base, as for PiSSA.
Both factors are orthonormal up to c, as in the official code; `peft` multiplies B by the singular values of G, so that
its start depends on the scale of the loss. Gradients are taken without dropout; those of quantised layers come from
what they read and what comes back. At most `per_pass` of them are held at once, each until its vectors are known.
The rate is that of the official configuration for T5-base, which has 5e-5 for other T5 and 1e-5 for Llama (2e-5 in
its examples).
Use it when steps are scarce and a few labelled batches are at hand.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.init import svd_lowrank
from ...core.method import Batches, WeightMethod, weight_at
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight
from ...statistics import mean_gradients, product_gradients

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
Vectors = tuple[Tensor, Tensor]
"""Leading singular vectors of a gradient, as columns: `out x q` and `in x q`."""


@method("lora_ga", paper="2407.05000", family="lowrank")
class LoRAGA(WeightMethod):
    """LoRA that starts along the loss's gradient; trains `rank * (in + out)` values a layer."""

    needs_data = True
    default_lr = 1e-4
    everywhere = ("per_pass",)

    rank: int = fields.positive(8, "inner dimension r; at most half of the layer's smaller width is used")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / sqrt(rank)", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    gamma: float = fields.number(16.0, "stability: larger is a smaller start; the published runs take 64", above=0)
    direction: str = fields.choice("ArB2r", DIRECTIONS, "singular vectors taken: A the first r and B the next r, ...")
    size: str = fields.choice(
        "stable", ("stable", "unit", "gd", "weight"), "c: as above, 1, 1 / s, or from W's singular values"
    )

    per_pass: int = fields.positive(64, "gradients held at a time: bounds memory, costs passes over the batches")

    def measure(self, base: Anatomy, batches: Batches) -> dict[Site, Vectors]:
        batches, found, places = list(batches), {}, dict[tuple[str, str], list[Site]]()
        for site in base.select(self.on, what="weight"):
            places.setdefault((site.path, site.parameter or "weight"), []).append(site)
        for start in range(0, len(places), self.per_pass):
            group = list(places.items())[start : start + self.per_pass]
            packed = [place for place, sites in group if weight_at(base.model, sites[0]).quantised]
            plain = [place for place, _ in group if place not in packed]
            taken = product_gradients(base.model, [path for path, _ in packed], batches) if packed else {}
            taken |= mean_gradients(base.model, [".".join(place) for place in plain], batches) if plain else {}
            for place, sites in group:
                gradient = taken.pop(place[0] if place in packed else ".".join(place))
                for site in sites:
                    weight = weight_at(base.model, site)
                    whole = gradient if place in packed else weight.canonical(gradient)
                    found[site] = self._vectors(whole if site.rows is None else whole[..., list(site.rows), :], weight)
        return found

    def assumed(self, base: Anatomy) -> dict[Site, Vectors]:
        return {site: self._vectors(g, weight_at(base.model, site)) for site, g in super().assumed(base).items()}

    def _vectors(self, gradient: Tensor, weight: Weight) -> Vectors:
        here = self.at(weight.path)
        assert isinstance(here, LoRAGA)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            u, _, v = svd_lowrank(gradient, min(4 * here._rank(weight), *gradient.shape[-2:]), niter=4)
        return u, v

    def delta(self, weight: Weight, **given: Any) -> LowRank:
        u, v = given["measured"]
        if u.dim() == 3:
            u, v = u[weight.number], v[weight.number]  # type: ignore[attr-defined]
        rank, scale = self._rank(weight), self.alpha / math.sqrt(self.rank)
        index = torch.arange(2 * rank) if self.direction != "random" else torch.randperm(2 * rank)
        index %= u.shape[-1]  # one row or column has but one direction, which both factors take
        halves = (index[1::2], index[::2]) if self.direction == "ArBr" else (index[:rank], index[rank:])
        for_a, for_b = reversed(halves) if self.direction == "A2rBr" else halves
        c = {"stable": weight.fan_out**0.25 / math.sqrt(self.gamma), "unit": 1.0, "gd": 1 / scale}.get(self.size)
        if c is None:
            values = svd_lowrank(weight.dense(), min(4 * rank, *weight.shape), niter=4)[1]
            c = float((values[:rank] / scale).sqrt().mean())
        a, b = c * v[:, for_a].T.contiguous(), c * u[:, for_b]
        return LowRank(a, b, scale=scale, dropout=self.dropout, a0=a.clone(), b0=b.clone())

    def _rank(self, weight: Weight) -> int:
        return max(1, min(self.rank, weight.fan_in // 2, weight.fan_out // 2))

    def count(self, weight: Weight) -> int:
        return self._rank(weight) * (weight.fan_in + weight.fan_out)
