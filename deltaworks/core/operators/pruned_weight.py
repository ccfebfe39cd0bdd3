"""Weights of which only some entries are left, with a change beside them: `W' = m W + scale (B A + S)`.

The base keeps its values; the mask acts where the product is computed. It is stored as bits, eight to a byte, and is
empty before anything is pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta
from .low_rank import plain
from .low_rank_sparse import LowRankSparse, packed, sparse_linear, unpacked


class Pruned(Delta):
    """`W' = m W`.

    Args:
        fan_out, fan_in: size of the weight.
        kept: m as bits; empty or absent for all.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in")
    additive = False
    lean = True
    kept: Tensor

    def __init__(self, fan_out: int, fan_in: int, kept: Tensor | None = None) -> None:
        super().__init__()
        self.fan_out, self.fan_in = fan_out, fan_in
        self.register_buffer("kept", _bits(kept, fan_out, fan_in))

    def mask(self) -> Tensor | None:
        """m, `out x in`; None while nothing is pruned."""
        return unpacked(self.kept, self.fan_out, self.fan_in) if self.kept.numel() else None

    def prune(self, mask: Tensor) -> None:
        """Keep only these entries, `out x in`."""
        self.kept = packed(mask).to(self.kept.device)

    def fold(self, weight: Tensor) -> Tensor:
        mask = self.mask()
        return weight if mask is None else weight.masked_fill(~mask, 0)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return True

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        return None if self.kept.numel() else call(x)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        mask = self.mask()
        return y if mask is None else y - (x @ weight.matrix().to(x.dtype).masked_fill(mask, 0).T).to(y.dtype)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not self.kept.numel() or not plain(self, x) or weight.dtype != x.dtype:
            return None
        nothing, nowhere = x.new_empty(0), torch.empty(0, dtype=torch.int32, device=x.device)
        return sparse_linear(x, weight, bias, nothing, nowhere, 1.0, self.fan_out, self.kept)


class PrunedLowRankSparse(LowRankSparse):
    """`W' = m W + scale (B A + S)`, or `m (W + ...)`.

    Args:
        a, b, values, index, scale, dropout: as for `LowRankSparse`; the scale is that of S, too.
        inside: whether m acts on the change as well, so that what is pruned stays zero when merged.
        kept: m as bits; empty or absent for all.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout", "inside")
    additive = False
    kept: Tensor

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        values: Tensor,
        index: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        inside: bool = False,
        kept: Tensor | None = None,
    ) -> None:
        super().__init__(a, b, values, index, scale, dropout, scale)
        self.inside = inside
        self.register_buffer("kept", _bits(kept, b.shape[0], a.shape[1]))

    def mask(self) -> Tensor | None:
        """m, `out x in`; None while nothing is pruned."""
        return unpacked(self.kept, self.b.shape[0], self.a.shape[1]) if self.kept.numel() else None

    def prune(self, mask: Tensor) -> None:
        """Keep only these entries, `out x in`."""
        self.kept = packed(mask).to(self.kept.device)

    def fold(self, weight: Tensor) -> Tensor:
        mask, change = self.mask(), self.dense()
        whole = weight.to(torch.promote_types(weight.dtype, change.dtype))
        if mask is None:
            return (whole + change).to(weight.dtype)
        if self.inside:
            return (whole + change).masked_fill(~mask, 0).to(weight.dtype)
        return (whole.masked_fill(~mask, 0) + change).to(weight.dtype)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return not (self.inside and self.kept.numel())

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        mask = self.mask()
        if mask is not None:
            y = y - (x @ weight.matrix().to(x.dtype).masked_fill(mask, 0).T).to(y.dtype)
        return y + self.side(x).to(y.dtype)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not self.kept.numel():
            return super().with_base(x, weight, bias)
        if not plain(self, x) or weight.dtype != x.dtype:
            return None
        return self._product(x, weight, bias, self.kept)


class Coefficients(Delta):
    """`W' = W diag(c)`, one coefficient for each unit (a head, a neuron) of what the layer reads; some are taken out.

    Args:
        c: the coefficients, one a unit.
        stays: which units are left, one byte each; all without it.
        width: features of a unit.
    """

    settings: ClassVar[tuple[str, ...]] = ("width",)
    additive = False
    lean = True
    stays: Tensor

    def __init__(self, c: Tensor, stays: Tensor | None = None, width: int = 1) -> None:
        super().__init__()
        self.c, self.width = nn.Parameter(c), width
        self.register_buffer("stays", torch.ones(len(c), dtype=torch.uint8) if stays is None else stays)

    def inputs(self) -> Tensor:
        """What every feature that the layer reads is multiplied by, `in`."""
        return (self.c * self.stays).repeat_interleave(self.width)

    def fold(self, weight: Tensor) -> Tensor:
        return (weight * self.inputs()).to(weight.dtype)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return self.site.rows is None

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        return call(x * self.inputs().to(x.dtype))


def _bits(kept: Tensor | None, fan_out: int, fan_in: int) -> Tensor:
    if kept is None:
        return torch.empty(0, dtype=torch.uint8)
    if kept.dtype != torch.uint8 or kept.numel() not in (0, -(-fan_out * fan_in // 8)):
        raise ValueError(f"a mask of {fan_out} x {fan_in} entries is as many bits, not {list(kept.shape)} {kept.dtype}")
    return kept
