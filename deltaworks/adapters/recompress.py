"""Any change of a weight as a product of two thin factors, the closest one of a given rank.

Stack the factors of all changes, `B = [B_1 .. B_n]` and `A = [A_1; ..; A_n]`, scales folded in. With `B = Q_b R_b`,
`A^T = Q_a R_a` and `R_b R_a^T = U S V^T`, the best pair of rank k is `B' = Q_b U_k sqrt(S_k)` and
`A' = sqrt(S_k) V_k^T Q_a^T`; the matrix itself, `out x in`, is never built. The error is `sqrt(sum_{i>k} S_i^2)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """`B A`, and how far it is from what it stands for.

    Attributes:
        a: `rank x in`.
        b: `out x rank`.
        error: Frobenius norm of the difference.
        norm: Frobenius norm of the change itself.
    """

    a: Tensor
    b: Tensor
    error: float
    norm: float


@torch.no_grad()
def truncated(b: Tensor, a: Tensor, rank: int) -> Pair:
    """The best pair of rank at most `rank` for `b a`, balanced: `B'^T B' = A' A'^T = diag(S)`.

    Args:
        b: `out x R`.
        a: `R x in`.
        rank: k, at least 1.
    """
    b, a = b.double(), a.double()
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        return of_matrix(b @ a, rank)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return _cut(q_b @ u, s, vh @ q_a.T, rank)


@torch.no_grad()
def of_matrix(change: Tensor, rank: int) -> Pair:
    """The best pair of rank at most `rank` for a matrix `out x in`."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return _cut(u, s, vh, rank)


def _cut(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> Pair:
    root = s[:rank].sqrt()
    error, norm = s[rank:].square().sum().sqrt(), s.square().sum().sqrt()
    return Pair((root[:, None] * vh[:rank]).contiguous(), u[:, :rank] * root, float(error), float(norm))


def padded(pair: Pair, rank: int) -> Pair:
    """The same product with `rank` inner dimensions, those missing filled with zeros."""
    more = rank - pair.a.shape[0]
    a = torch.cat([pair.a, pair.a.new_zeros(more, pair.a.shape[1])])
    b = torch.cat([pair.b, pair.b.new_zeros(pair.b.shape[0], more)], dim=1)
    return Pair(a, b, pair.error, pair.norm)
