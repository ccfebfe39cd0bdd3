"""NLoRA: Nyström-initiated low-rank adaptation (Guo et al. 2025, arXiv:2502.14482), and its two relatives.

W' = W + s B N A,  N: rank x rank,  s = alpha / rank.  `slora_structured` (SLoRA there) starts A and N Kaiming uniform
and B = 0. `nlora` copies slices of the weight, A = W[:r], N = W[:r, :r], B = W[:, :r], and needs no decomposition; the
authors' code neither inverts N nor subtracts the start, so the output moves a little at first: `nystrom="pinv"` and
`subtract_init` do what the text suggests. `inttune` freezes the slices, trains N alone and stores nothing else.
Use `nlora` instead of PiSSA when a decomposition is too slow, `inttune` for the smallest files.
"""

import torch

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.tri_factor import Intermediate, TriFactor
from ...core.registry import method
from ...model.weights import Weight


@method("slora_structured", paper="2502.14482", family="lowrank")
class SLoRAStructured(WeightMethod):
    """LoRA with a trained middle; trains `rank * (in + out) + rank^2` values a layer."""

    rank: int = fields.positive(128, "inner dimension r, at most the smaller side")
    alpha: float | None = fields.number(None, "numerator of the scale alpha / rank; none for alpha = rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")

    def delta(self, weight: Weight) -> TriFactor:
        r = size(self.rank, weight)
        a, n, b = kaiming(r, weight.fan_in), kaiming(r, r), zeros(weight.fan_out, r)
        return TriFactor(a, n, b, scale=scale(self), dropout=self.dropout)

    def count(self, weight: Weight) -> int:
        r = size(self.rank, weight)
        return r * (weight.fan_in + weight.fan_out) + r * r


@method("nlora", paper="2502.14482", family="lowrank")
class NLoRA(WeightMethod):
    """Slices of the weight as factors; trains `rank * (in + out) + rank^2` values a layer."""

    exact_at_start = False
    default_lr = 1e-4

    rank: int = fields.positive(128, "inner dimension r, at most the smaller side")
    alpha: float | None = fields.number(None, "numerator of the scale alpha / rank; none for alpha = rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    nystrom: str = fields.choice("raw", ["raw", "pinv"], "the middle: W[:r, :r] as it is, or its pseudo-inverse")
    subtract_init: bool = fields.flag(False, "subtract the start, so that the output begins unchanged")

    def delta(self, weight: Weight) -> TriFactor:
        dense, r = weight.dense(), size(self.rank, weight)
        a, n, b = dense[:r].clone(), dense[:r, :r].clone(), dense[:, :r].clone()
        if self.nystrom == "pinv":
            n = torch.linalg.pinv(n)
        start = {"a0": a.clone(), "b0": b @ n} if self.subtract_init else {}
        return TriFactor(a, n, b, scale=scale(self), dropout=self.dropout, **start)

    def count(self, weight: Weight) -> int:
        r = size(self.rank, weight)
        return r * (weight.fan_in + weight.fan_out) + r * r


@method("inttune", paper="2502.14482", family="lowrank")
class IntTune(WeightMethod):
    """Only the middle between slices of the weight; trains `rank^2` values a layer."""

    exact_at_start = False

    rank: int = fields.positive(128, "inner dimension r, at most the smaller side")
    alpha: float | None = fields.number(None, "numerator of the scale alpha / rank; none for alpha = rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")

    def delta(self, weight: Weight) -> Intermediate:
        r = size(self.rank, weight)
        return Intermediate(weight.dense()[:r, :r].clone(), scale=scale(self), dropout=self.dropout)

    def count(self, weight: Weight) -> int:
        return size(self.rank, weight) ** 2


def size(rank: int, weight: Weight) -> int:
    """r at one weight, which has no more rows or columns to give."""
    return min(rank, weight.fan_in, weight.fan_out)


def scale(method: SLoRAStructured | NLoRA | IntTune) -> float:
    """s, of all layers alike."""
    return 1.0 if method.alpha is None else method.alpha / method.rank
