"""LoRA-GA: low-rank adaptation with gradient approximation (Wang et al. 2024, arXiv:2407.05000).

W' = W + s (B A - B0 A0),  s = alpha / sqrt(rank),  G = U S V^T the gradient of the loss by W, averaged over batches;
A0 = c V_1..r^T,  B0 = c U_r+1..2r,  c = out^(1/4) / sqrt(gamma): the first step of both factors then moves W along the
best rank-2r approximation of G. The start is subtracted beside the untouched base, as for PiSSA.
Both factors are orthonormal up to c, as in the official code; `peft` multiplies B by the singular values of G, so that
its start depends on the scale of the loss. Gradients are taken without dropout; those of quantised layers come from
what they read and what comes back.
Use it when steps are scarce and a few labelled batches are at hand.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.method import Batches, WeightMethod, weight_at
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight
from ...statistics import mean_gradients, product_gradients

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")


@method("lora_ga", paper="2407.05000", family="lowrank")
class LoRAGA(WeightMethod):
    """LoRA that starts along the loss's gradient; trains `rank * (in + out)` values a layer."""

    needs_data = True
    default_lr = 1e-4

    rank: int = fields.positive(8, "inner dimension r; at most half of the layer's smaller width is used")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / sqrt(rank)", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    gamma: float = fields.number(16.0, "stability: larger is a smaller start; the published runs take 64", above=0)
    direction: str = fields.choice("ArB2r", DIRECTIONS, "singular vectors taken: A the first r and B the next r, ...")
    size: str = fields.choice(
        "stable", ("stable", "unit", "gd", "weight"), "c: as above, 1, 1 / s, or from W's singular values"
    )

    def measure(self, base: Anatomy, batches: Batches) -> dict[Site, Tensor]:
        sites = list(base.select(self.on, what="weight"))
        packed = [s for s in sites if weight_at(base.model, s).quantised]
        batches = list(batches) if packed else batches
        gradients = {}
        if packed:
            gradients = product_gradients(base.model, list(dict.fromkeys(s.path for s in packed)), batches)
        names = {s: f"{s.path}.{s.parameter}" for s in sites if s not in packed}
        plain = mean_gradients(base.model, list(dict.fromkeys(names.values())), batches) if names else {}
        found = {}
        for site in sites:
            weight = weight_at(base.model, site)
            whole = gradients[site.path] if site in packed else weight.canonical(plain[names[site]])
            found[site] = whole if site.rows is None else whole[..., list(site.rows), :]
        return found

    def delta(self, weight: Weight, **given: Any) -> LowRank:
        gradient: Tensor = given["measured"]
        if gradient.dim() == 3:
            gradient = gradient[weight.number]  # type: ignore[attr-defined]
        rank, scale = self._rank(weight), self.alpha / math.sqrt(self.rank)
        u, _, v = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
        index = torch.arange(2 * rank) if self.direction != "random" else torch.randperm(2 * rank)
        halves = (index[1::2], index[::2]) if self.direction == "ArBr" else (index[:rank], index[rank:])
        for_a, for_b = reversed(halves) if self.direction == "A2rBr" else halves
        c = {"stable": weight.fan_out**0.25 / math.sqrt(self.gamma), "unit": 1.0, "gd": 1 / scale}.get(self.size)
        if c is None:
            values = torch.svd_lowrank(weight.dense().cpu(), q=min(4 * rank, *weight.shape), niter=4)[1]
            c = float((values[:rank] / scale).sqrt().mean())
        a, b = c * v[:, for_a].T.contiguous(), c * u[:, for_b]
        return LowRank(a, b, scale=scale, dropout=self.dropout, a0=a.clone(), b0=b.clone())

    def _rank(self, weight: Weight) -> int:
        return max(1, min(self.rank, weight.fan_in // 2, weight.fan_out // 2))

    def count(self, weight: Weight) -> int:
        return self._rank(weight) * (weight.fan_in + weight.fan_out)
