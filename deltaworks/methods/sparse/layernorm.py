"""LayerNorm: a key component in parameter-efficient fine-tuning (ValizadehAslani and Liang 2024, arXiv:2403.20284).

y = norm(x) (w + v_w) + b + v_b,  v = 0, at the norm of every block's feed-forward part; only v trains.
`on="norm"` takes every norm. `share` keeps that part of the entries, those of largest Fisher information
F_j = (1/N) sum_n (d log p(y_n | x_n) / d theta_j)^2 over the given batches, ranked over all chosen norms together
(per example, true labels, at the pre-trained weights). No official code was found.
Use it for classifiers that must stay tiny: two vectors a block, and the merged model has the base's shape.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.init import zeros
from ...core.method import Batches, Method, Placed, label, weight_at
from ...core.operators.offset import Offset
from ...core.part import Shared
from ...core.places import evenly
from ...core.registry import method
from ...model.anatomy import Anatomy, Site
from ...statistics import fisher

NORM = "mlp.norm"


@method("layernorm", paper="2403.20284", family="sparse")
class LayerNorm(Method):
    """Scales and shifts of norms; trains `2 * width` values a norm (`width` where it has no shift)."""

    default_lr = 1e-3
    on: Any = fields.sites(NORM, "norms that train: mlp.norm (that of the feed-forward part), norm for all, ...")
    share: float | None = fields.number(
        None, "part of the entries that train, by Fisher information (needs data); none for all", above=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs_data", self.share is not None)

    def measure(self, base: Anatomy, batches: Batches) -> dict[Site, Tensor]:
        """The entries to train of every norm parameter, ascending."""
        sites = list(self._sites(base))
        names = {site: f"{site.path}.{site.parameter}".lstrip(".") for site in sites}
        scores = fisher(base.model, list(names.values()), batches)
        flat = torch.cat([scores[names[site]] for site in sites])
        best = torch.zeros(len(flat), dtype=torch.bool)
        count = max(1, round((self.share or 1.0) * len(flat)))
        best[flat.sort(descending=True, stable=True).indices[:count]] = True
        parts = best.split([len(scores[names[site]]) for site in sites])
        return {site: part.nonzero().flatten() for site, part in zip(sites, parts, strict=True)}

    def assumed(self, base: Anatomy) -> dict[Site, Tensor]:
        sites = list(self._sites(base))
        sizes = [weight_at(base.model, site).fan_out for site in sites]
        count = max(1, round((self.share or 1.0) * sum(sizes)))
        return dict(zip(sites, evenly(sizes, count), strict=True))

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: dict[Site, Tensor] | None) -> Iterator[Placed]:
        for site in self._sites(base):
            size = weight_at(base.model, site).fan_out
            if measured is None:
                yield Placed(site, Offset(zeros(size)), label(site))
            elif len(measured[site]):
                yield Placed(site, Offset(zeros(len(measured[site])), measured[site], size), label(site))

    def _sites(self, base: Anatomy) -> Iterator[Site]:
        # A block without a feed-forward norm of its own (a state-space mixer, a parallel block) has one for everything.
        lone = self.on == NORM and not any(site.role == NORM for site in base.sites)
        inside = [site for site in base.sites if site.kind == "norm" and site.block is not None]
        for site in inside if lone and inside else base.select(self.on):
            if site.kind != "norm":
                raise ValueError(f"layernorm: {site.path} is no norm; on={self.on!r} must name norms, as mlp.norm does")
            module = base.model.get_submodule(site.path)
            for parameter in ("weight", "bias"):
                if module._parameters.get(parameter) is not None:
                    yield replace(site, parameter=parameter)

    def group(self, name: str) -> dict[str, float]:
        return {"weight_decay": 0.0}
