"""GLoRA: one-for-all, generalized LoRA for parameter-efficient fine-tuning (Chavan et al. 2023, arXiv:2306.07967).

W' = W + W * A + B,  b' = b + b * D + E + W C  (A elementwise, as in the official code). A and B are "lora" (a product
of rank r), "vector" (one value an output), "constant" or "none"; C, added to what the layer reads, is "lora", "vector"
or "none"; D and E are "vector", "constant" or "none". All start at zero; a missing bias is made.
`supernet` trains all kinds at once: every call in training draws one of 432 configurations for its layer. Then
`core.supernet.search` finds each layer's by evolution under a budget of parameters, and drops the rest.
Fused experts have no bias of their own here and take A and B only.
Use it where a merged change of any kind is welcome and a validation set can choose its shape.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.experts import PerExpert
from ...core.init import zeros
from ...core.method import LINEAR, Method, Placed, experts_of, label, weight_at
from ...core.operators.general import BIAS_TERMS, WEIGHT_TERMS, BiasTerms, WeightTerms
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy
from ...model.weights import Weight


@method("glora", paper="2306.07967", family="lowrank")
class GLoRA(Method):
    """Weights and biases scaled and shifted; at most `2 rank (in + out) + rank (in + 1) + 2 out` values a layer."""

    default_lr = 1e-4
    overridable = True
    everywhere = ("supernet",)

    on: Any = fields.sites(LINEAR)
    rank: int = fields.positive(4, "inner dimension r of the terms of kind lora")
    a: str = fields.choice("lora", WEIGHT_TERMS["a"], "A, which scales the weight")
    b: str = fields.choice("lora", WEIGHT_TERMS["b"], "B, which is added to the weight")
    c: str = fields.choice("lora", BIAS_TERMS["c"], "C, which is added to the layer's input")
    d: str = fields.choice("vector", BIAS_TERMS["d"], "D, which scales the bias")
    e: str = fields.choice("vector", BIAS_TERMS["e"], "E, which is added to the bias")
    supernet: bool = fields.flag(False, "train all kinds, drawing one a call, to search for the best")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        for site in base.select(self.on, what="weight"):
            weight, here = weight_at(base.model, site), self.at(site.path)
            assert isinstance(here, GLoRA)
            if self.supernet and (site.kind != "linear" or not site.called):
                raise ValueError(
                    f"glora: a supernet takes linear layers that are called, {site.name} is not; narrow on="
                )
            # The bias comes first: its C is multiplied by the weight as the base has it.
            if site.kind == "linear" and site.called and site.parameter == "weight":
                part = here.bias_terms(weight)
                if part is not None:
                    bias = replace(site, parameter="bias")
                    yield Placed(bias, part, label(bias))
            if here.supernet or (here.a, here.b) != ("none", "none"):
                deltas = [here.weight_terms(one) for one in (experts_of(weight) if weight.experts else [weight])]
                yield Placed(site, PerExpert(list(deltas)) if weight.experts else deltas[0], label(site))

    def weight_terms(self, weight: Weight) -> WeightTerms:
        """A and B of a weight."""
        tensors = {}
        for term, kind in (("a", self.a), ("b", self.b)):
            tensors |= self._term(term, kind, weight.fan_out, weight.fan_in)
        return WeightTerms({"a": self.a, "b": self.b}, self.supernet, **tensors)

    def bias_terms(self, weight: Weight) -> BiasTerms | None:
        """C, D and E of a weight's bias, None if there are none; without a bias there is nothing for D to scale."""
        d = self.d if weight.bias() is not None else "none"
        kinds = {"c": self.c, "d": d, "e": self.e}
        if not self.supernet and set(kinds.values()) == {"none"}:
            return None
        tensors = self._term("c", self.c, weight.fan_in, 1)
        for term in "de":
            held = "vector" if self.supernet and (term == "e" or weight.bias() is not None) else kinds[term]
            tensors |= self._term(term, held, weight.fan_out, 1)
        return BiasTerms(weight.fan_out, kinds, self.supernet, **tensors)  # type: ignore[arg-type]

    def _term(self, name: str, kind: str, rows: int, columns: int) -> dict[str, Tensor]:
        if self.supernet and name in "abc":
            kind = "lora"
        if kind == "lora":
            bound = (6 / (self.rank + columns)) ** 0.5
            return {f"{name}d": zeros(rows, self.rank), f"{name}u": torch.rand(self.rank, columns) * 2 * bound - bound}
        return {} if kind == "none" else {f"{name}d": zeros(rows if kind == "vector" else 1, 1)}
