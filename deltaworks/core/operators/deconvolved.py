"""A rank-one map in a subspace, blown up by a transposed convolution whose stride is its kernel's side.

`dW = scale * kron(a^T b^T, K)^T`: every `d x d` block of `dW^T` is a multiple of K. That is `(b kron K^T)(a kron I)`, a
product of rank d whose factors hold `d (in + out)` numbers and are made when needed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .low_rank import Factored


class Deconvolved(Factored):
    """`dW = scale * conv_transpose2d(a^T b^T, K, stride=d)^T`.

    Args:
        a: `1 x in/d`.
        b: `out/d x 1`.
        k: K, `d x d`.
        scale: multiplies the change.
        dropout: probability of zeroing an input feature in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")

    def __init__(self, a: Tensor, b: Tensor, k: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if a.dim() != 2 or len(a) != 1 or b.shape[1:] != (1,) or k.dim() != 2 or k.shape[0] != k.shape[1]:
            shapes = f"{list(a.shape)}, {list(b.shape)} and a kernel {list(k.shape)}"
            raise ValueError(f"{shapes} do not fit; a is 1 x in/d, b out/d x 1, the kernel d x d")
        self.a, self.b, self.k = nn.Parameter(a), nn.Parameter(b), nn.Parameter(k)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.k.shape[-1]

    def factors(self) -> tuple[Tensor, Tensor]:
        one = torch.eye(self.rank, dtype=self.a.dtype, device=self.a.device)
        return torch.kron(self.a, one), torch.kron(self.b, self.k.mT.contiguous())
