"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv:2310.11454).

W' = W + diag(lambda_b) B diag(lambda_d) A,  with one frozen random pair A, B for all layers, drawn from `seed` and
sliced to each layer's size;  lambda_d starts at `d_initial`, lambda_b at 0, and only these vectors train.
Use it to keep very many adapters: a layer stores `rank + out` numbers. It learns with about ten times LoRA's rate.
"""

from typing import Any

import torch

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod, weight_at
from ...core.operators.scaled import RandomPair, ScaledRandom
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy
from ...model.weights import Weight


@method("vera", paper="2310.11454", family="lowrank")
class VeRA(WeightMethod):
    """Two trained vectors around a shared random pair; trains `rank + out` values a layer."""

    default_lr = 1e-2
    everywhere = ("seed",)

    rank: int = fields.positive(256, "inner dimension r of the shared pair")
    d_initial: float = fields.number(0.1, "starting value of lambda_d")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    seed: int = fields.whole(0, "seed of the shared pair")

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        shapes = [weight_at(base.model, site).shape for site in base.select(self.on, what="weight")]
        ranks = [self.rank, *(int(own["rank"]) for own in self.overrides.values() if "rank" in own)]
        fan_in, fan_out = max(shape[-1] for shape in shapes), max(shape[-2] for shape in shapes)
        return {"pair": RandomPair(max(ranks), fan_in, fan_out, self.seed)}

    def delta(self, weight: Weight, **given: Any) -> ScaledRandom:
        lambda_d, lambda_b = torch.full((self.rank,), self.d_initial), zeros(weight.fan_out)
        return ScaledRandom(lambda_d, lambda_b, given["pair"], fan_in=weight.fan_in, dropout=self.dropout)

    def count(self, weight: Weight) -> int:
        return self.rank + weight.fan_out
