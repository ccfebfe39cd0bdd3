"""Monarch matrices: two block-diagonal factors with a permutation between and one after.

`w1` is `K x Q x P` and acts on K slices of the input, `w2` is `L x S x K R` with `Q = R L` and acts on L interleaved
slices of the middle; the output's index is `s L + l`. Every strided block `M[l::L, k P:(k + 1) P]` has rank R. Inputs
and outputs that are no multiples of K and L are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta
from .low_rank import dropped
from .made import made_linear
from .recompute import recomputed


class Monarch(Delta):
    """`W' = W + M`, or `W' = M`.

    Args:
        w1: `K x R L x P`.
        w2: `L x S x K R`.
        fan_out, fan_in: size of the weight, at most `S L` and `K P`.
        replaces: M takes the weight's place; the layer is not called then.
        dropout: probability of zeroing an input feature in training; only beside the weight.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in", "replaces", "dropout")
    lean = True
    scale, train_a, train_b = 1.0, True, True

    def __init__(
        self, w1: Tensor, w2: Tensor, fan_out: int, fan_in: int, replaces: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        (k, q, p), (l, s, kr) = w1.shape, w2.shape
        if q % l or kr != q // l * k or not (0 <= k * p - fan_in < max(k * p, 1) and s * l - fan_out >= 0):
            shapes = f"{list(w1.shape)} and {list(w2.shape)}"
            raise ValueError(f"factors {shapes} make no Monarch matrix {fan_out} x {fan_in}")
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)
        self.fan_out, self.fan_in, self.replaces, self.dropout = fan_out, fan_in, replaces, float(dropout)
        # Read by whoever combines deltas; a constant of the instance, as `replaces` is.
        self.__dict__["additive"] = not replaces

    def dense(self) -> Tensor:
        (k, q, p), (l, s, _) = self.w1.shape, self.w2.shape
        m = torch.einsum("lskr,krlp->slkp", self.w2.view(l, s, k, q // l), self.w1.view(k, q // l, l, p))
        return m.reshape(s * l, k * p)[: self.fan_out, : self.fan_in]

    def fold(self, weight: Tensor) -> Tensor:
        return self.dense().to(weight.dtype) if self.replaces else super().fold(weight)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # A part of a fused projection cannot be left out of the layer's call, which gives all parts.
        if self.replaces:
            return self.site.rows is None
        # Measured: the weight costs its gradient, one product a token, and to build it as much as some hundred tokens.
        area, each = weight.fan_in * weight.fan_out, self.w1.numel() + self.w2.numel()
        return bool(self.dropout and self.training) or 4 * tokens * each < area * (tokens + 256)

    def side(self, x: Tensor) -> Tensor:
        return recomputed(self._applied, dropped(self, x), self.w1, self.w2)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        # Between the factors there are few values: with zeros in them, they are those of a low-rank change.
        few = 4 * self.w1[..., 0].numel() <= min(self.fan_in, self.fan_out)
        return made_linear(self, x, weight, bias) if few and not self.replaces else None

    def sources(self) -> list[Tensor]:
        """The factors, as they train."""
        return [self.w1, self.w2]

    def made(self, dtype: torch.dtype, *sources: Tensor) -> tuple[Tensor, Tensor]:
        """The factors as matrices, `K R L x in` and `out x K R L`, with their zeros."""
        w1, w2 = (source.to(dtype) for source in sources)
        (k, q, p), (l, s, kr) = w1.shape, w2.shape
        first = (w1.unsqueeze(2) * torch.eye(k, dtype=dtype, device=w1.device).view(k, 1, k, 1)).view(k * q, k * p)
        spread = w2.transpose(0, 1).unsqueeze(-1) * torch.eye(l, dtype=dtype, device=w2.device).unsqueeze(1)
        return first[:, : self.fan_in], spread.reshape(s * l, kr * l)[: self.fan_out]

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        if not self.replaces:
            return None
        y, bias = self.side(x), weight.bias()
        return y if bias is None else y + bias.to(y.dtype)

    def multiplied_out(self) -> Replaced:
        """The same change as one matrix that trains, of a part that replaces the weight."""
        return Replaced(self.dense().detach().clone(memory_format=torch.contiguous_format))

    def _applied(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        (k, _, p), l = w1.shape, len(w2)
        x = nn.functional.pad(x, (0, k * p - self.fan_in)).unflatten(-1, (k, p))
        middle = torch.einsum("...kp,kqp->...kq", x, w1.to(x.dtype)).flatten(-2).unflatten(-1, (-1, l))
        return torch.einsum("...rl,lsr->...sl", middle, w2.to(x.dtype)).flatten(-2)[..., : self.fan_out]


class Replaced(Delta):
    """`W' = W0`, a matrix that trains in the weight's place.

    Args:
        w: W0, `out x in`.
    """

    additive = False
    replaces = True

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        if w.dim() != 2:
            raise ValueError(f"a weight is replaced by a matrix, not by {list(w.shape)}")
        self.w = nn.Parameter(w)

    def fold(self, weight: Tensor) -> Tensor:
        return self.w.to(weight.dtype, copy=True)  # a merged base must not share memory with what trains


def projected(dense: Tensor, inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest Monarch matrix in the Frobenius norm: the best rank-R approximation of every strided block.

    Args:
        dense: `out x in`.
        inputs: K.
        outputs: L.
        rank: R, at most the smaller side of a block.

    Returns:
        `w1` (`K x R L x P`) and `w2` (`L x S x K R`).
    """
    fan_out, fan_in = dense.shape
    s, p = -(-fan_out // outputs), -(-fan_in // inputs)
    padded = nn.functional.pad(dense, (0, inputs * p - fan_in, 0, outputs * s - fan_out))
    blocks = padded.view(s, outputs, inputs, p).permute(1, 2, 0, 3)  # L x K x S x P
    u, values, vh = torch.linalg.svd(blocks, full_matrices=False)
    root = values[..., :rank].sqrt()
    w2 = (u[..., :rank] * root.unsqueeze(-2)).permute(0, 2, 1, 3).reshape(outputs, s, inputs * rank)
    w1 = (vh[..., :rank, :] * root.unsqueeze(-1)).permute(1, 2, 0, 3).reshape(inputs, rank * outputs, p)
    return w1.contiguous(), w2.contiguous()
