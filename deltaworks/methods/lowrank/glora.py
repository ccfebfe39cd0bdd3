"""GLoRA: one-for-all, generalized LoRA for parameter-efficient fine-tuning (Chavan et al. 2023, arXiv:2306.07967).

W' = W + W * A + B,  b' = b + b * D + E + W C  (A elementwise, as in the official code). A and B are "lora" (a product
of rank r), "vector" (one value an output), "constant" or "none"; C, added to what the layer reads, is "lora", "vector"
or "none"; D and E are "vector", "constant" or "none". All start at zero; a missing bias is made.
`supernet` trains all kinds at once: every call in training draws one of 432 configurations for its layer. Then
`search` finds each layer's by evolution under a budget of parameters, and drops the rest.
Fused experts have no bias of their own here and take A and B only.
Use it where a merged change of any kind is welcome and a validation set can choose its shape.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.evolution import Genome, Sizes, evolve
from ...core.experts import PerExpert
from ...core.init import zeros
from ...core.method import LINEAR, Method, Placed, experts_of, label, weight_at
from ...core.operators.general import BIAS_TERMS, WEIGHT_TERMS, BiasTerms, Terms, WeightTerms
from ...core.part import Shared
from ...core.registry import method
from ...core.tuned import Tuned
from ...model.anatomy import Anatomy
from ...model.weights import Weight


@method("glora", paper="2306.07967", family="lowrank")
class GLoRA(Method):
    """Weights and biases scaled and shifted; at most `2 rank (in + out) + rank (in + 1) + 2 out` values a layer."""

    default_lr = 1e-4

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
        d = self.d if self.supernet or weight.bias() is not None else "none"
        kinds = {"c": self.c, "d": d, "e": self.e}
        if not self.supernet and set(kinds.values()) == {"none"}:
            return None
        tensors = self._term("c", self.c, weight.fan_in, 1)
        for term in "de":
            held = "vector" if self.supernet and (term == "e" or weight.bias() is not None) else kinds[term]
            tensors |= self._term(term, held, weight.fan_out, 1)
        return BiasTerms(weight.fan_out, kinds, self.supernet, **tensors)

    def _term(self, name: str, kind: str, rows: int, columns: int) -> dict[str, Tensor]:
        if self.supernet and name in "abc":
            kind = "lora"
        if kind == "lora":
            bound = (6 / (self.rank + columns)) ** 0.5
            return {f"{name}d": zeros(rows, self.rank), f"{name}u": torch.rand(self.rank, columns) * 2 * bound - bound}
        return {} if kind == "none" else {f"{name}d": zeros(rows if kind == "vector" else 1, 1)}


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        kinds: of every part, by name.
        score: of the configuration.
        parameters: that it trains.
        history: the best score after each generation.
    """

    kinds: dict[str, dict[str, str]]
    score: float
    parameters: int
    history: list[float]


def search(
    tuned: Tuned,
    score: Callable[[], float],
    *,
    budget: int = 1_000_000,
    sizes: Sizes | None = None,
    seed: int = 0,
    settle: bool = True,
) -> Found:
    """Find every layer's configuration by evolution, and leave the adapter in it.

    Args:
        tuned: a `glora` adapter that was trained with `supernet=True`.
        score: a number for the model as it is set at the time, such as accuracy on held-out data; larger is better.
        budget: largest number of parameters of a configuration.
        sizes: of the search; none for the paper's.
        seed: the same seed gives the same search.
        settle: drop the tensors that the result does not use; else the supernet stays, set to the result.

    Raises:
        ValueError: when the adapter has no supernet.
    """
    parts = {name: part for name, part in tuned.named_parts() if isinstance(part, Terms) and part.searching}
    if not parts:
        raise ValueError(f"{tuned.name} has no supernet to search; attach glora with supernet=True and train it")
    genes = [(name, term) for name, part in parts.items() for term in part.choices]
    costs = [{kind: _cost(parts[name], term, kind) for kind in parts[name].choices[term]} for name, term in genes]

    def configure(genome: Genome) -> None:
        for name, part in parts.items():
            part.configure({term: kind for (owner, term), kind in zip(genes, genome, strict=True) if owner == name})

    def scored(genome: Genome) -> float:
        configure(genome)
        return float(score())

    modes = {module: module.training for module in tuned.model.modules()}
    tuned.model.eval()
    try:
        best, history = evolve(costs, scored, budget, sizes or Sizes(), seed)
    finally:
        for module, mode in modes.items():
            module.training = mode
    configure(best)
    kinds = {name: dict(part.kinds) for name, part in parts.items()}
    if settle:
        for name, part in parts.items():
            tuned.exchange(name, part.settled())
    return Found(kinds, history[-1], sum(cost[kind] for cost, kind in zip(costs, best, strict=True)), history)


def _cost(part: Terms, term: str, kind: str) -> int:
    """How many values a term of a kind trains."""
    down, up = getattr(part, f"{term}d"), getattr(part, f"{term}u", None)
    if down is None:
        return 0
    lora = down.numel() + up.numel() if up is not None else 0
    return {"lora": lora, "vector": down.shape[0], "constant": 1, "none": 0}[kind]
