"""HRA: Householder reflection adaptation (Yuan et al. 2024, arXiv:2405.17484).

W' = W H_1 H_2 ... H_r,  H_i = I - 2 u_i u_i^T,  u_i unit vectors. They start in equal pairs, whose reflections cancel,
so r is even; trained are columns that are normalised when used, as long at first as those of `peft` (Kaiming uniform,
fan-in r / 2). `penalty` adds lambda sum ||I - U^T U||_F^2, which drives the pairs apart; the paper takes 1e-5 to 1e-3
(`peft` has none; rates in the authors' scripts are 1e-5 for LLaMA, 1e-4 for diffusion, 8e-4 to 3e-3 for GLUE). `strict`
is its limit: columns made orthogonal, W' = W (I - 2 U U^T), which cannot start at W.
Use it to stay close to pre-training: every angle and length among the weight's rows is kept.
"""

import torch
from torch import Tensor

from ...core import fields
from ...core.experts import setting
from ...core.init import kaiming
from ...core.method import WeightMethod
from ...core.operators.rotation import Householder, units
from ...core.registry import method
from ...core.rule import Rule, Run, pooled
from ...model.weights import Weight


class Apart(Rule):
    """Adds `strength * sum ||I - U^T U||_F^2` over the unit vectors of every site."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def penalty(self, run: Run) -> Tensor | None:
        free = (part for _, part in run.tuned.of_kind(Householder) if not setting(part, "orthogonal"))
        columns = [units(part.get_parameter("u")) for part in free]
        terms = [(torch.eye(u.shape[-1], dtype=u.dtype, device=u.device) - u.mT @ u).square().sum() for u in columns]
        return self.strength * pooled(terms).sum() if terms else None


@method("hra", paper="2405.17484", family="structured")
class HRA(WeightMethod):
    """A chain of reflections; trains `rank * in` values a layer."""

    default_lr = 3e-3
    everywhere = ("penalty",)

    rank: int = fields.positive(8, "number of reflections r, even unless strict")
    strict: bool = fields.flag(False, "orthogonal reflections; the output then changes at the start")
    penalty: float = fields.number(1e-4, "lambda, weight of the orthogonality term; 0 for none", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % 2 and not self.strict:
            raise ValueError(f"hra: rank={self.rank} is not allowed; reflections cancel in pairs, so it must be even")
        if self.strict and self.penalty not in (0.0, type(self).penalty):
            raise ValueError(f"hra: penalty={self.penalty:g} is given, but strict columns are apart; leave it out")
        object.__setattr__(self, "exact_at_start", not self.strict)

    def delta(self, weight: Weight) -> Householder:
        if self.strict:
            return Householder(kaiming(weight.fan_in, min(self.rank, weight.fan_in)), orthogonal=True)
        return Householder(kaiming(weight.fan_in, self.rank // 2).repeat_interleave(2, dim=1))

    def rules(self) -> list[Rule]:
        return [Apart(self.penalty)] if self.penalty and (self.overrides or not self.strict) else []

    def count(self, weight: Weight) -> int:
        return (min(self.rank, weight.fan_in) if self.strict else self.rank) * weight.fan_in
