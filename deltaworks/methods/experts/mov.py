"""MoV: mixture of vectors, from Pushing Mixture of Experts to the Limit (Zadouri et al. 2023, arXiv:2309.05444).

out = v * sum_e p_e l_e,  p = softmax(v G),  l_e = 1 and G ~ N(0, 0.02) at the start: the base's output, whatever G is.
Where (IA)^3 has one vector, at keys, values and the inner activation of the feed-forward part; the router reads the
very activation that it scales. In attention every head is routed by itself, with one G (`head width x E`) for all of
them. All experts are always weighed; there is no top-k, no noise and no balance term (as in the official code).
Experts that the base itself has fused have no activation that could be reached; its attention is adapted all the same.
Use it for many tasks in one adapter at (IA)^3's size. It cannot be merged: the scaling depends on the token.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...core import fields
from ...core.method import Method, Placed, weight_at
from ...core.operators.vector_mixture import VectorMixture
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy, Site

INNER = "mlp.down"
PLACES = ["attention.key", "attention.value", "cross_attention.key", "cross_attention.value", INNER]


@method("mov", paper="2309.05444", family="experts")
class MoV(Method):
    """Routed scalings; trains `E (d + d / heads)` values at keys and at values, `2 E d_ff` at the inner activation."""

    mergeable = False
    default_lr = 3e-4
    refuses = ("mamba",)

    experts: int = fields.positive(10, "E, number of vectors; the paper takes 10, 30 and 60")
    on: Any = fields.sites(PLACES, "linear layers: mlp.down is scaled at its input, every other at its output")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        for site in base.select(self.on, strict=self.on != PLACES):
            if site.kind != "linear" or site.parameter != "weight":
                raise ValueError(f"mov scales the activations of linear layers; {site.name} is a {site.kind}")
            weight, at_input = weight_at(base.model, site), site.role == INNER
            width = weight.fan_in if at_input else weight.fan_out
            part = VectorMixture(width, self._heads(base, site, width), self.experts, at_input)
            tag = "mixture" if site.part is None else f"mixture_{site.part}"
            yield Placed(replace(site, parameter=None), part, tag)

    def _heads(self, base: Anatomy, site: Site, width: int) -> int:
        """How many heads the activation of a site has; one outside keys and values."""
        if site.block is None or (site.role or "").rpartition(".")[2] not in ("query", "key", "value"):
            return 1
        size = base.blocks[site.block].head_dim
        return width // size if size and width % size == 0 else 1
