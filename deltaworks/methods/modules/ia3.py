"""(IA)^3: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638).

k = l_k * (W_k x),  v = l_v * (W_v x),  ffn(x) = W_2 (l_ff * g(x)),  every l = 1 at the start; only l trains.
Scaling an output is W' = diag(l) W, b' = l b; scaling the inner activation is W_2' = W_2 diag(l). Merged, it costs
nothing. A fused query-key-value projection is scaled in its key and value rows only (a popular library scales the
queries too); fused experts have a vector each.
Use it with very little data: a vector of numbers near one, a few thousand values in all.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.experts import PerExpert
from ...core.init import ones
from ...core.method import Method, Placed, label, weight_at
from ...core.operators.scaling import Scaling
from ...core.part import Delta, Shared
from ...core.registry import method
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight

INNER = ["mlp.down", "expert.down"]
PLACES = ["attention.key", "attention.value", "cross_attention.key", "cross_attention.value", *INNER]


@method("ia3", paper="2205.05638", family="modules")
class IA3(Method):
    """Learned scales; trains `out` values at keys and values, `in` at the second feed-forward layer."""

    default_lr = 3e-3
    refuses = ("mamba",)

    on: Any = fields.sites(PLACES)
    inputs: Any = fields.sites(INNER, "those among them that are scaled at their input instead of their output")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        sites = base.select(self.on, strict=self.on != PLACES)
        inner = _inner(base, self.inputs)
        for site in sites:
            weight = weight_at(base.model, site)
            yield Placed(site, self.delta(weight, at_input=site in inner), label(site))

    def delta(self, weight: Weight, *, at_input: bool) -> Delta:
        """The scaling of one weight, at its input or at its output."""
        size = weight.fan_in if at_input else weight.fan_out
        if weight.experts is None:
            return Scaling(ones(size), at_input)
        return PerExpert([Scaling(ones(size), at_input) for _ in range(weight.experts)])

    def group(self, name: str) -> dict[str, float]:
        # Decay would pull the factors to zero, away from the base.
        return {"weight_decay": 0.0}


def _inner(base: Anatomy, inputs: Any) -> set[Site]:
    if inputs == INNER:
        return {site for site in base.sites if site.role in INNER}
    return set(base.select(inputs))
