"""Initial values. All are drawn on the CPU, so that the same seed gives the same adapter on any device; without a
generator from the global one, which `attach` seeds.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..model.weights import Weight


def kaiming(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Kaiming uniform with a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in the last dimension."""
    return uniform(*shape, bound=1 / math.sqrt(shape[-1]), generator=generator)


def kaiming_relu(*shape: int) -> Tensor:
    """Kaiming uniform with a = 0: U(-sqrt(6/fan_in), sqrt(6/fan_in)), fan_in the last dimension."""
    return uniform(*shape, bound=math.sqrt(6 / shape[-1]))


def uniform(*shape: int, bound: float, generator: torch.Generator | None = None) -> Tensor:
    """U(-bound, bound)."""
    return torch.rand(*shape, generator=generator).mul_(2 * bound).sub_(bound)


def normal(*shape: int, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """N(0, std^2)."""
    return torch.randn(*shape, generator=generator) * std


def zeros(*shape: int) -> Tensor:
    """All zero."""
    return torch.zeros(*shape)


def ones(*shape: int) -> Tensor:
    """All one."""
    return torch.ones(*shape)


def svd_lowrank(matrix: Tensor, rank: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (`... x out x rank`), S and V (`... x in x rank`), as `torch.svd_lowrank` with `q = rank` finds them.

    torch draws where the matrix is, from a generator that nobody seeds; here subspace iteration begins with a random
    matrix of the CPU's (Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1).
    """
    if matrix.shape[-2] < matrix.shape[-1]:  # of a tall matrix, as torch does: the same draws give the same factors
        v, s, u = svd_lowrank(matrix.mT, rank, niter)
        return u, s, v
    probe = torch.randn(matrix.shape[-1], rank, dtype=matrix.dtype, device="cpu").to(matrix.device)
    q = torch.linalg.qr(matrix @ probe).Q
    for _ in range(niter):
        q = torch.linalg.qr(matrix.mT @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, vh = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
    return q @ u, s, vh.mT


def seed_for(seed: int, weight: Weight) -> int:
    """A seed of its own for every weight of a model; the experts of one stack have theirs in common."""
    rows = weight.rows[0] if weight.rows else 0
    return zlib.crc32(f"{seed} {weight.path} {weight.parameter} {rows}".encode())
