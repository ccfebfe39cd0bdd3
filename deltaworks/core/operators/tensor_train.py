"""Tensor trains: a long list of numbers as a chain of small cores, and maps and low-rank factors made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..init import normal, uniform, zeros
from ..part import Delta, Module
from .bottleneck import ACTIVATIONS
from .low_rank import Factored

OFFICIAL: dict[tuple[int, int], tuple[int, ...]] = {
    (768, 64): (8, 8, 12, 8, 8),
    (1024, 64): (4, 8, 8, 8, 8, 4),
    (4096, 64): (16, 16, 16, 4, 4, 4),
    (5120, 64): (5, 8, 8, 16, 8, 8),
    (8192, 64): (4, 16, 16, 16, 8, 4),
    (768, 8): (8, 8, 12, 8),
    (1024, 8): (4, 8, 8, 8, 4),
    (4096, 8): (16, 16, 8, 4, 4),
    (5120, 8): (8, 8, 10, 8, 8),
    (8192, 8): (4, 16, 16, 16, 4),
    (768, 768): (8, 8, 12, 12, 8, 8),
    (1024, 1024): (4, 8, 8, 16, 8, 8, 4),
    (4096, 4096): (4, 4, 16, 16, 16, 16, 4, 4),
    (8192, 8192): (4, 4, 16, 16, 16, 16, 8, 8),
}
"""The authors' axes for a map between a layer's width and a bottleneck, and for a head's dense layer (theirs for 5120
multiply to something else)."""


def axes(width: int, narrow: int) -> tuple[int, ...]:
    """Axes whose product is `width * narrow`: the authors', else factors of one and of the other, each at most 16
    where prime factors allow."""
    return OFFICIAL.get((width, narrow)) or (*_split(width), *_split(narrow))


def _split(number: int) -> list[int]:
    primes, left, p = [], number, 2
    while left > 1:
        if p * p > left:
            p = left
        while left % p == 0:
            primes.append(p)
            left //= p
        p += 1
    parts: list[int] = []
    for prime in sorted(primes, reverse=True):
        at = next((i for i, part in enumerate(parts) if part * prime <= 16), None)
        if at is None:
            parts.append(prime)
        else:
            parts[at] *= prime
    return parts or [1]


def size(shape: Sequence[int], rank: int) -> int:
    """Number of values in the cores of a train."""
    ranks = [1, *[rank] * (len(shape) - 1), 1]
    return sum(ranks[i] * k * ranks[i + 1] for i, k in enumerate(shape))


def cores(shape: Sequence[int], rank: int, total: int) -> nn.ParameterList:
    """Random cores, `r x k x r` (1 at the ends), whose product has entries of variance `1 / total`."""
    ranks = [1, *[rank] * (len(shape) - 1), 1]
    share = math.sqrt(1 / total) ** (1 / len(shape))
    return nn.ParameterList(
        nn.Parameter(normal(ranks[i], k, ranks[i + 1], std=share / math.sqrt(ranks[i + 1])))
        for i, k in enumerate(shape)
    )


def contracted(train: Sequence[Tensor], rows: int) -> Tensor:
    """The train's numbers as a matrix of `rows` rows."""
    whole = train[0].flatten(0, 1)
    for core in train[1:]:
        whole = (whole @ core.flatten(1)).reshape(-1, core.shape[-1])
    return whole.reshape(rows, -1)


class TrainLowRank(Factored):
    """`dW = scale (A B - A0 B0)^T` with A (`in x r`) and B (`r x out`) tensor trains.

    Args:
        fan_in, fan_out: size of the weight.
        bottleneck: r.
        train_rank: rank of the trains.
        subtract: keep the first cores, frozen, and subtract their product, so that the start changes nothing.
        scale: multiplies the change.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "fan_in", "fan_out", "bottleneck", "train_rank", "subtract", "scale", "dropout",
    )  # fmt: skip

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        bottleneck: int,
        train_rank: int,
        subtract: bool,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fan_in, self.fan_out, self.bottleneck = fan_in, fan_out, bottleneck
        self.train_rank, self.subtract = train_rank, subtract
        self.scale, self.dropout = float(scale), float(dropout)
        self.a = cores(axes(fan_in, bottleneck), train_rank, fan_in + bottleneck)
        self.b = cores(axes(fan_out, bottleneck), train_rank, fan_out + bottleneck)
        if subtract:
            self.a0, self.b0 = (
                nn.ParameterList(nn.Parameter(core.detach().clone(), requires_grad=False) for core in train)
                for train in (self.a, self.b)
            )

    @property
    def rank(self) -> int:
        return self.bottleneck * (2 if self.subtract else 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self._pair("a", "b")
        if not self.subtract:
            return a, b
        a0, b0 = self._pair("a0", "b0")
        return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)

    def dense(self) -> Tensor:
        if not self.subtract:
            return super().dense()
        (a, b), (a0, b0) = self._pair("a", "b"), self._pair("a0", "b0")
        # Two products of equal factors differ by exactly nothing; one product of the joined factors would by rounding.
        return self.scale * (b @ a - b0 @ a0)

    def _pair(self, first: str, second: str) -> tuple[Tensor, Tensor]:
        a, b = (list(self.get_submodule(name).parameters()) for name in (first, second))
        return contracted(a, self.fan_in).mT, contracted(b, self.bottleneck).mT


class TrainWeight(Delta):
    """`W' = T^T`: a tensor train T (`in x out`) in the weight's place.

    Args:
        fan_in, fan_out: size of the weight.
        train_rank: rank of the train.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_in", "fan_out", "train_rank")
    additive = False
    replaces = True

    def __init__(self, fan_in: int, fan_out: int, train_rank: int) -> None:
        super().__init__()
        self.fan_in, self.fan_out, self.train_rank = fan_in, fan_out, train_rank
        self.cores = cores(axes(fan_in, fan_out), train_rank, fan_in + fan_out)

    def fold(self, weight: Tensor) -> Tensor:
        return contracted(list(self.cores), self.fan_in).mT.to(weight.dtype)


class TrainBottleneck(Module):
    """A bottleneck adapter of two tensor trains: `h + scale (f(h D + b_D) U + b_U)`.

    Args:
        width: d, of h.
        bottleneck: of the map between.
        train_rank: rank of the trains.
        activation: f, a key of `ACTIVATIONS`.
        scale: multiplies the change.
        dropout: probability of zeroing a feature of h on the added path in training.
        before: acts on what the module reads instead of what it gives.
        quiet: the last core and the bias of U start at zero, so that nothing changes at first.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "width", "bottleneck", "train_rank", "activation", "scale", "dropout", "before",
    )  # fmt: skip

    def __init__(
        self,
        width: int,
        bottleneck: int,
        train_rank: int,
        activation: str = "relu",
        scale: float = 1.0,
        dropout: float = 0.0,
        before: bool = False,
        quiet: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.bottleneck, self.train_rank, self.before = width, bottleneck, train_rank, before
        self.activation, self.scale, self.dropout = activation, scale, dropout
        self.f: Callable[[Any], Any] = ACTIVATIONS[activation]
        shape, total = axes(width, bottleneck), width + bottleneck
        self.down, self.up = cores(shape, train_rank, total), cores(shape, train_rank, total)
        self.down_bias = nn.Parameter(uniform(bottleneck, bound=1 / math.sqrt(bottleneck)))
        self.up_bias = nn.Parameter(zeros(width) if quiet else uniform(width, bound=1 / math.sqrt(width)))
        if quiet:
            nn.init.zeros_(self.up[-1])

    def maps(self) -> tuple[Tensor, Tensor]:
        """D (`d x bottleneck`) and U (`bottleneck x d`)."""
        return contracted(list(self.down), self.width), contracted(list(self.up), self.bottleneck)

    def added(self, y: Tensor, r: Tensor) -> Tensor:
        """`y` and what is made of `r`, both `... x width`."""
        down, up = (m.to(r.dtype) for m in self.maps())
        kept = F.dropout(r, self.dropout, self.training)
        z = self.f(F.linear(kept, down.T, self.down_bias.to(r.dtype)))
        return y + self.scale * F.linear(z, up.T, self.up_bias.to(r.dtype)).to(y.dtype)

    def input(self, x: Tensor) -> Tensor:
        return self.added(x, x) if self.before else x

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.before else self.added(y, y)
