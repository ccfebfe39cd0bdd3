"""BitFit: simple parameter-efficient fine-tuning with only the biases (Ben Zaken et al. 2022, arXiv:2106.10199).

y = W x + b + v,  v: out = 0, at every linear layer and norm; only v trains.
The official code trains every parameter whose name has `bias`, those of embedding norm and pooler among them, without
weight decay. A base without biases (Llama, T5) gets new ones at the chosen linear layers; merged, it then has
parameters that its architecture does not know, so keep the adapter beside it if the file must load elsewhere.
Use it when almost nothing may be stored: under 0.1 % of an encoder.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ...core import fields
from ...core.init import zeros
from ...core.method import LINEAR, Method, Placed, label, weight_at
from ...core.operators.offset import Offset
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight


@method("bitfit", paper="2106.10199", family="sparse")
class BitFit(Method):
    """Bias terms; trains `out` values a layer. The paper's half is `on=["attention.query", "mlp.up"], norms=False`."""

    on: Any = fields.sites(LINEAR, "layers whose biases train: roles, regular expressions, module types, or a list")
    norms: bool = fields.flag(True, "train the norms' biases as well, where they have any")
    create: bool | None = fields.choice(
        None, (None, True, False), "give a layer without a bias one; none for only where no chosen layer has a bias"
    )

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        layers = [replace(site, parameter="bias") for site in base.select(self.on) if site.kind in ("linear", "conv")]
        if self.on == LINEAR:
            poolers = [replace(site, parameter="bias") for site in base.sites if site.role == "pooler"]
            layers += [site for site in poolers if _has(base, site)]
        create = self.create
        if create is None:
            create = not any(_has(base, site) for site in layers)
        chosen = [site for site in layers if create or _has(base, site)]
        if self.norms:
            everywhere = [replace(site, parameter="bias") for site in base.sites if site.kind == "norm"]
            chosen += [site for site in everywhere if site.role != "norm.head" and _has(base, site)]
        for site in chosen:
            yield Placed(site, self.delta(weight_at(base.model, site)), label(site))

    def delta(self, bias: Weight) -> Offset:
        """The offset of one bias."""
        return Offset(zeros(*bias.shape))

    def group(self, name: str) -> dict[str, float]:
        return {"weight_decay": 0.0}


def _has(base: Anatomy, site: Site) -> bool:
    module: nn.Module = base.model.get_submodule(site.path)
    return module._parameters.get("bias") is not None
