"""A frozen orthonormal factor and a trained upper-trapezoidal one: `dW = scale * Q R`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .low_rank import Factored


class Trapezoid(Factored):
    """`dW = scale * Q R`, R zero below its diagonal; the zeros are neither stored nor trained.

    Args:
        r: the entries of R on and above the diagonal, row by row: `rank * in - rank (rank - 1) / 2`.
        q: Q, `out x rank`, frozen.
        fan_in: width of the input.
        scale: multiplies the product.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_in", "scale")

    def __init__(self, r: Tensor, q: Tensor, fan_in: int, scale: float = 1.0) -> None:
        super().__init__()
        rank = q.shape[-1]
        if q.dim() != 2 or rank > fan_in or r.shape != (rank * fan_in - rank * (rank - 1) // 2,):
            raise ValueError(
                f"{list(r.shape)} entries do not fill the trapezoid of Q {list(q.shape)} on {fan_in} inputs"
            )
        self.r, self.q = nn.Parameter(r), nn.Parameter(q, requires_grad=False)
        self.fan_in, self.scale = fan_in, float(scale)

    @property
    def rank(self) -> int:
        return self.q.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        rows, columns = torch.triu_indices(self.rank, self.fan_in, device=self.r.device)
        full = torch.zeros(self.rank * self.fan_in, dtype=self.r.dtype, device=self.r.device)
        return full.index_add(0, rows * self.fan_in + columns, self.r).view(self.rank, self.fan_in), self.q
