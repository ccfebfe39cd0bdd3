"""RoSA: robust adaptation (Nikdan et al. 2024, arXiv:2401.04679).

W' = W + alpha / r B A + S,  S zero but for the share `density` of its entries, those of the largest gradient. They are
chosen as the paper recommends: LoRA alone trains for `warmup` steps; the gradients G of the effective weights are then
collected over `batches` batches, G^2 (or G) averaged, and the k largest kept in each layer; after that all starts
afresh, new A and B, S = 0, the choice fixed. The warm-up is the measurement: `data` should hold as many batches.
Use it where LoRA stays below full fine-tuning, at the same budget.
"""

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ...core import fields
from ...core.attach import attach, detach, merge
from ...core.init import kaiming, zeros
from ...core.method import Batches, Method, WeightMethod, weight_at
from ...core.operators.low_rank_sparse import LowRankSparse
from ...core.registry import make, method
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight
from ...statistics import mean_gradients, product_gradients
from ...statistics.running import loss_of, untouched


@method("rosa", paper="2401.04679", family="structured")
class RoSA(WeightMethod):
    """Low rank plus sparse; trains `rank * (in + out) + int(density * out * in)` values a layer."""

    needs_data = True
    default_lr = 7e-4
    everywhere = ("warmup", "warmup_lr", "batches", "average")

    rank: int = fields.positive(16, "inner dimension r")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / r", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch; 0.05 in the paper")
    density: float = fields.number(0.006, "share of S's entries that train, at least one", above=0, high=1)
    warmup: int = fields.whole(64, "steps that LoRA trains alone before gradients are collected")
    warmup_lr: float = fields.number(7e-4, "learning rate of these steps", above=0)
    batches: int = fields.positive(1, "batches whose gradients are collected")
    average: str = fields.choice("squares", ["squares", "gradients"], "what is averaged over these batches")
    sparse_lr_scale: float = fields.number(2 / 7, "learning rate of S relative to the run's", above=0)

    def measure(self, base: Anatomy, batches: Batches) -> dict[Site, Tensor]:
        """The average of the effective weight's gradient or its square, after the warm-up, by site, on the CPU."""
        data, model, sites = list(batches), base.model, list(base.select(self.on, what="weight"))
        if not data:
            raise ValueError("rosa: no batch was given, so there is no gradient to choose entries by")
        supply, name = cycle(data), "rosa_warmup"
        packed = any(weight_at(model, site).quantised for site in sites)
        found: dict[Site, Tensor] = {}
        with untouched(model), torch.enable_grad():
            if self.warmup:
                tuned = attach(model, make("lora", rank=self.rank, alpha=self.alpha, on=self.on), name=name, seed=0)
            try:
                if self.warmup:
                    self._warm(model, tuned.parameters(), supply)
                    if not packed:
                        # The merged weight is the effective one, and its gradient is what is wanted.
                        merge(model, untie=True)
                for batch in islice(supply, self.batches):
                    for site, gradient in _gradients(base, sites, batch, packed).items():
                        value = gradient.square() if self.average == "squares" else gradient
                        found[site] = found[site] + value if site in found else value
            finally:
                if self.warmup:
                    detach(model, name)
        return found

    def made_of(self) -> list[Method]:
        return [make("lora")] if self.warmup else []

    def _warm(self, model: nn.Module, parameters: list[nn.Parameter], supply: Iterator[Any]) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=self.warmup_lr, weight_decay=0.0)
        for batch in islice(supply, self.warmup):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

    def delta(self, weight: Weight, **given: Any) -> LowRankSparse:
        measured: Tensor = given["measured"]
        if measured.dim() == 3:
            measured = measured[weight.number]  # type: ignore[attr-defined]
        index = measured.abs().flatten().topk(self._entries(weight)).indices.sort().values
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        return LowRankSparse(a, b, zeros(len(index)), index, scale=self.alpha / self.rank, dropout=self.dropout)

    def _entries(self, weight: Weight) -> int:
        return max(1, int(self.density * weight.fan_out * weight.fan_in))

    def group(self, name: str) -> dict[str, float]:
        return {"lr_scale": self.sparse_lr_scale} if name == "values" else {}

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out) + self._entries(weight)


def _gradients(base: Anatomy, sites: list[Site], batch: Any, packed: bool) -> dict[Site, Tensor]:
    """Each weight's gradient for one batch; those of quantised ones from what the layers read and get back."""
    if packed:
        products = product_gradients(base.model, list(dict.fromkeys(site.path for site in sites)), [batch])
        whole = {site: products[site.path] for site in sites}
    else:
        parameters = {site: base.model.get_parameter(f"{site.path}.{site.parameter}") for site in sites}
        names = {id(parameter): f"{site.path}.{site.parameter}" for site, parameter in parameters.items()}
        found, whole = mean_gradients(base.model, list(names.values()), [batch]), {}
        for site, parameter in parameters.items():
            gradient = found.get(names[id(parameter)])  # none of, say, an expert that no token went to
            gradient = torch.zeros(parameter.shape) if gradient is None else gradient
            whole[site] = weight_at(base.model, site).canonical(gradient)
    return {s: own if s.rows is None else own[..., list(s.rows), :] for s, own in whole.items()}
