"""A full-rank delta from frozen random bases with trained diagonal scalings.

`dW = scale * B F`: one random `A` (`rank x short`) is scaled anew for each of the `N` bases, row by row and column by
column, to F (`N rank x short`), and meets a random `B` (`long x N rank`). Scaled is the shorter side of the weight.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Shared
from .made import Made, constant


class RandomBases(Shared):
    """The frozen bases of an adapter, for all layers: drawn on the CPU from a seed, each divided by its own deviation.

    Args:
        rank: r, of every basis.
        short, long: the smaller and the larger of the widest input and output.
        seed: of the generator.
        sparsity: q, for entries of +-1 with probability 1/(2q) each and 0 else; None for uniform ones.
    """

    settings: ClassVar[tuple[str, ...]] = ("rank", "short", "long", "seed", "sparsity")
    a: Tensor
    b: Tensor

    def __init__(self, rank: int, short: int, long: int, seed: int, sparsity: float | None = None) -> None:
        super().__init__()
        self.rank, self.short, self.long, self.seed, self.sparsity = rank, short, long, seed, sparsity
        generator = torch.Generator("cpu").manual_seed(seed)
        count = -(-short // rank)
        if sparsity is None:
            a = _uniform(rank, 1, short, generator)
            b = torch.cat([_uniform(long, 1, rank, generator) for _ in range(count)], dim=1)
        else:
            a, b = _ternary(rank, 1, short, sparsity, generator), _ternary(long, count, rank, sparsity, generator)
        self.register_buffer("a", (a / a.std()).float().squeeze(1), persistent=False)
        self.register_buffer("b", (b / b.std()).float(), persistent=False)


def _uniform(first: int, second: int, third: int, generator: torch.Generator) -> Tensor:
    # Drawn and divided in bfloat16, which makes them the numbers that PEFT has for the same seed.
    values = torch.empty(first, second, third, dtype=torch.bfloat16, device="cpu")
    return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)


def _ternary(first: int, second: int, third: int, sparsity: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(first, second, third, generator=generator, dtype=torch.float32, device="cpu")
    share = 1 / (2 * sparsity)
    return (drawn > 1 - share).float() - (drawn < share).float()


class RandomMixture(Made):
    """Trained scalings of shared random bases.

    Args:
        lam: lambda, `rank x N`, with `N = ceil(short / rank)` for this layer's shorter side.
        gamma: `N x short`.
        bases: the shared random matrices, of which this layer takes the first rows and columns.
        fan_out, fan_in: size of the weight.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    costly = any_order = True
    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in", "scale", "dropout")
    borrowed: ClassVar[tuple[str, ...]] = ("bases",)

    def __init__(
        self,
        lam: Tensor,
        gamma: Tensor,
        bases: RandomBases,
        fan_out: int,
        fan_in: int,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        short, long, rank = min(fan_out, fan_in), max(fan_out, fan_in), bases.rank
        wanted = (rank, -(-short // rank)), (-(-short // rank), short)
        if (tuple(lam.shape), tuple(gamma.shape)) != wanted or short > bases.short or long > bases.long:
            found = f"lambda {list(lam.shape)} and gamma {list(gamma.shape)} for {fan_out} x {fan_in}"
            raise ValueError(f"{found} do not fit shared bases of rank {rank}, {bases.long} x {bases.short}")
        self.lam, self.gamma, self.bases = nn.Parameter(lam), nn.Parameter(gamma), bases
        self.fan_out, self.fan_in, self.scale, self.dropout = fan_out, fan_in, float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.lam.numel()

    @property
    def train_a(self) -> bool:  # type: ignore[override]
        """Whether A is the scaled basis."""
        return self.fan_in <= self.fan_out

    @property
    def train_b(self) -> bool:  # type: ignore[override]
        """Whether B is the scaled basis."""
        return not self.train_a

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        if self.dropout and self.training:
            return True
        # The inner dimension is as wide as the weight. In training the side path makes two products a pass and one for
        # the scaled factor's gradient; the weight is built twice, and its gradient costs two products more.
        area, short = self.fan_in * self.fan_out, min(self.fan_in, self.fan_out)
        if not torch.is_grad_enabled():
            return tokens * (self.fan_in + self.fan_out) < area
        return tokens * (2 * (self.fan_in + self.fan_out) + short) < 3 * area + tokens * area / self.rank

    def sources(self) -> list[Tensor]:
        return [self.lam, self.gamma]

    def made(self, dtype: torch.dtype, *sources: Tensor) -> tuple[Tensor, Tensor]:
        scaled, b = self._scaled(dtype, *sources), self._basis(dtype)
        return (scaled, b) if self.train_a else (b.T, scaled.T)

    def dense(self) -> Tensor:
        a, b = self.factors()
        return self.scale * (b @ a)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        lam, gamma = self.lam.detach().to(change.dtype), self.gamma.detach().to(change.dtype)
        slope = self._basis(change.dtype, turned=True) @ (change if self.train_a else change.T)
        slope = slope.unflatten(0, lam.shape).mul_(self._first(change.dtype)).transpose(0, 1)
        dlam = torch.bmm(slope, gamma.unsqueeze(2)).squeeze(2).T
        dgamma = torch.bmm(lam.T.unsqueeze(1), slope).squeeze(1)
        return dlam.to(self.lam.dtype).mul(self.scale), dgamma.to(self.gamma.dtype).mul(self.scale)

    def _scaled(self, dtype: torch.dtype, lam: Tensor, gamma: Tensor) -> Tensor:
        """F, `rank N x short`: every row of A for each basis."""
        scaled = lam.to(dtype).unsqueeze(-1) * self._first(dtype)
        gamma = gamma.to(dtype)
        return (scaled * gamma if scaled.requires_grad or gamma.requires_grad else scaled.mul_(gamma)).flatten(0, 1)

    def _first(self, dtype: torch.dtype) -> Tensor:
        """A, `rank x 1 x short`."""
        short = self.gamma.shape[-1]
        return constant(self.bases.a, dtype, lambda a: a[:, None, :short], short)

    def _basis(self, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
        """B, `long x N rank`, or its transpose."""
        long, count = max(self.fan_out, self.fan_in), -(-min(self.fan_out, self.fan_in) // self.bases.rank)

        def view(b: Tensor) -> Tensor:
            whole = b[:long, :count].flatten(1)
            return whole.T if turned else whole

        return constant(self.bases.b, dtype, view, (long, count, turned))
