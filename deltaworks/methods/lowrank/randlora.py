"""RandLoRA: full-rank parameter-efficient fine-tuning (Albert et al. 2025, arXiv:2502.00987).

dW = s sum_n B_n diag(lambda_n) A diag(gamma_n),  N = ceil(min(in, out) / rank) random bases, frozen and shared by all
layers;  lambda = 0 and gamma = 1 / max(N, min(in, out)) train,  s = alpha / rank. For in > out the sum is transposed.
As in `peft`, bases are flattened basis-major in B and rank-major in A, which pairs random columns in another order.
The official scripts take a rate of 1e-4 (2e-4 for GPT-2), the same as for LoRA; so is ours that of `lora`.
Use it where low rank itself is the limit; a larger `rank` (of one basis) means fewer parameters.
"""

import math
from typing import Any

import torch

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod, weight_at
from ...core.operators.random_bases import RandomBases, RandomMixture
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy
from ...model.weights import Weight


@method("randlora", paper="2502.00987", family="lowrank")
class RandLoRA(WeightMethod):
    """Trained scalings of random bases; trains `N * (rank + min(in, out))` values a layer."""

    overridable = False

    rank: int = fields.positive(32, "r, rank of one basis")
    alpha: float | None = fields.number(None, "numerator of the scale alpha / rank; none for 20 rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    seed: int = fields.whole(0, "seed of the bases")
    sparse: str = fields.choice("no", ["no", "sparse", "very"], "bases of -1, 0, 1: q = 3, or q = sqrt(min(in, out))")

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        weights = [weight_at(base.model, site) for site in base.select(self.on, what="weight")]
        short, long = sorted((max(w.fan_in for w in weights), max(w.fan_out for w in weights)))
        sparsity = {"no": None, "sparse": 3.0, "very": math.sqrt(short)}[self.sparse]
        return {"bases": RandomBases(self.rank, short, long, self.seed, sparsity)}

    def delta(self, weight: Weight, **given: Any) -> RandomMixture:
        fan_out, fan_in = weight.fan_out, weight.fan_in
        count, short = self._bases(weight), min(fan_out, fan_in)
        return RandomMixture(
            zeros(self.rank, count),
            torch.full((count, short), 1 / max(count, short)),
            given["bases"],
            fan_out,
            fan_in,
            scale=20.0 if self.alpha is None else self.alpha / self.rank,
            dropout=self.dropout,
        )

    def _bases(self, weight: Weight) -> int:
        return -(-min(weight.fan_out, weight.fan_in) // self.rank)

    def count(self, weight: Weight) -> int:
        return self._bases(weight) * (self.rank + min(weight.fan_out, weight.fan_in))
