"""Rank-one triplets: `dW = scale * P diag(l) Q`, whose terms `l_i p_i q_i^T` can be weighed, dropped and regrown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..moments import keep
from .low_rank import Factored


def orthogonality(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """How far factors are from orthogonal: the mean of `||P^T P - I||` and `||Q Q^T - I||` (Frobenius).

    Args:
        pairs: P (`... out x rank`) and Q (`... rank x in`) of every layer, at least one.
    """
    alike: dict[tuple[Any, ...], list[Tensor]] = {}  # by size and device: few large operations instead of many small
    for p, q in pairs:
        for gram in (p.mT @ p, q @ q.mT):
            alike.setdefault((gram.shape[-1], gram.device, gram.dtype), []).append(gram)
    norms = []
    for (size, device, dtype), grams in alike.items():
        stack = torch.cat([gram.reshape(-1, size, size) for gram in grams])
        norms.append(torch.linalg.matrix_norm(stack - torch.eye(size, dtype=dtype, device=device)))
    return torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


class Triplet(Factored):
    """`dW = scale * P diag(l) Q`.

    Args:
        p: `out x rank`.
        l: `rank`, the weights of the terms.
        q: `rank x in`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")

    def __init__(self, p: Tensor, l: Tensor, q: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if p.dim() != 2 or q.dim() != 2 or l.dim() != 1 or not p.shape[1] == len(l) == q.shape[0]:
            shapes = f"P {list(p.shape)}, l {list(l.shape)} and Q {list(q.shape)}"
            raise ValueError(f"{shapes} are not triplets; P is out x r, l has r values, Q is r x in")
        self.p, self.l, self.q = nn.Parameter(p), nn.Parameter(l), nn.Parameter(q)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.l.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.q, self.p * self.l


@torch.no_grad()
def compact(p: nn.Parameter, l: nn.Parameter, q: nn.Parameter, optimizer: Any = None) -> None:
    """Drop the triplets whose weight is zero, in place; the parameters take new shapes.

    In a stack (leading axes, one for each matrix) all keep as many as the matrix with the most.

    Args:
        p: `... x out x rank`.
        l: `... x rank`.
        q: `... x rank x in`.
        optimizer: whose state of what stays goes along.
    """
    zero = l == 0
    rank = int((~zero).sum(-1).max())
    chosen = zero.int().argsort(dim=-1, stable=True)[..., :rank].sort(dim=-1).values
    for tensor, dim in ((p, -1), (l, -1), (q, -2)):
        keep(tensor, chosen, dim, optimizer)
