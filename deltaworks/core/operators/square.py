"""A square matrix between parameter-free compression and decompression: high rank for few parameters.

`share`: input features that are r apart are added up, the result is repeated along the output.
`rotate`: every block of r input features is turned by the angles of its position, multiplied by the same matrix, and
becomes a block of the output. Inputs that do not fill the last block continue with the first features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta
from .low_rank import dropped
from .recompute import recomputed


class Square(Delta):
    """`dW x = decompress(M compress(x))`.

    Args:
        m: M, `r x r`.
        kind: `share` or `rotate` (r is even).
        fan_out, fan_in: size of the weight.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("kind", "fan_out", "fan_in", "dropout")
    lean = True

    def __init__(self, m: Tensor, kind: str, fan_out: int, fan_in: int, dropout: float = 0.0) -> None:
        super().__init__()
        if m.dim() != 2 or m.shape[0] != m.shape[1] or kind not in ("share", "rotate"):
            raise ValueError(f"M {list(m.shape)} of kind {kind!r}: it must be square, the kind share or rotate")
        if kind == "rotate" and m.shape[0] % 2:
            raise ValueError(f"pairs of features are turned, so the side of M must be even, not {m.shape[0]}")
        self.m = nn.Parameter(m)
        self.kind, self.fan_out, self.fan_in, self.dropout = kind, fan_out, fan_in, float(dropout)

    def dense(self) -> Tensor:
        return self._product(torch.eye(self.fan_in, dtype=self.m.dtype, device=self.m.device), self.m).T

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return bool(self.dropout and self.training) or tokens * self.m.shape[0] < weight.fan_in * weight.fan_out

    def side(self, x: Tensor) -> Tensor:
        x = dropped(self, x)
        if self.kind == "share":  # keeps the sums only, `tokens x r`
            return self._product(x, self.m.to(x.dtype))
        return recomputed(self._product, x, self.m.to(x.dtype))

    def _product(self, x: Tensor, m: Tensor) -> Tensor:
        r = m.shape[0]
        blocks = -(-self.fan_in // r)
        extra = torch.arange(blocks * r - self.fan_in, device=x.device) % self.fan_in
        x = torch.cat([x, x[..., extra]], dim=-1).unflatten(-1, (blocks, r))
        o = x.sum(-2, keepdim=True) @ m.T if self.kind == "share" else _turned(x) @ m.T
        return o.flatten(-2)[..., torch.arange(self.fan_out, device=x.device) % (o.shape[-2] * r)]


def _turned(x: Tensor) -> Tensor:
    """Every block (`... x blocks x r`) turned by its position, pairs being r/2 apart, as rotary embeddings are."""
    blocks, r = x.shape[-2:]
    exact = torch.promote_types(x.dtype, torch.float32)
    rates = 10000 ** (-torch.arange(0, r, 2, dtype=exact, device=x.device) / r)
    angles = torch.arange(blocks, dtype=exact, device=x.device).unsqueeze(1) * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
