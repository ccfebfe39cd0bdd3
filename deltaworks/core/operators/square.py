"""A square matrix between parameter-free compression and decompression: high rank for few parameters.

`share`: input features that are r apart are added up, the result is repeated along the output.
`rotate`: every block of r input features is turned by the angles of its position, multiplied by the same matrix, and
becomes a block of the output. Inputs that do not fill the last block continue with the first features.
A chain of shared ones adds up and repeats in another way with every link.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta, frozen
from .low_rank import base_product, branch_input, dropped, kept, plain
from .recompute import recomputed
from .saving import save, saved


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
    scale = 1.0

    def __init__(self, m: Tensor, kind: str, fan_out: int, fan_in: int, dropout: float = 0.0) -> None:
        super().__init__()
        if m.dim() != 2 or m.shape[0] != m.shape[1] or kind not in ("share", "rotate"):
            raise ValueError(f"M {list(m.shape)} of kind {kind!r}: it must be square, the kind share or rotate")
        if kind == "rotate" and m.shape[0] % 2:
            raise ValueError(f"pairs of features are turned, so the side of M must be even, not {m.shape[0]}")
        self.m = nn.Parameter(m)
        self.kind, self.fan_out, self.fan_in, self.dropout = kind, fan_out, fan_in, float(dropout)

    def dense(self) -> Tensor:
        return self._product(torch.eye(self.fan_in, dtype=self.m.dtype, device=self.m.device), self._inner()).T

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return bool(self.dropout and self.training) or tokens * self.m.shape[0] < weight.fan_in * weight.fan_out

    def side(self, x: Tensor) -> Tensor:
        x = dropped(self, x)
        if self.kind == "share":  # keeps the sums only, `tokens x r`
            return self._product(x, self._inner().to(x.dtype))
        return recomputed(self._product, x, self.m.to(x.dtype))

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if self.kind != "rotate" or not plain(self, x) or weight.dtype != x.dtype:
            return None
        survive, scale = kept(self, x)
        return _SquareLinear.apply(x, weight, bias, self.m, self._blocks, scale, survive)  # type: ignore[return-value]

    def _blocks(self, m: Tensor, dtype: torch.dtype) -> Tensor:
        """What each block of the input is multiplied by, its turn and M in one; those only that the output has."""
        r = m.shape[0]
        count = min(-(-self.fan_in // r), -(-self.fan_out // r))
        cos, sin = (table.unsqueeze(-1) for table in _angles(count, r, torch.promote_types(m.dtype, torch.float32), m))
        first, second = m.T.chunk(2)
        return torch.cat([cos * first + sin * second, cos * second - sin * first], dim=1).to(dtype)

    def _inner(self) -> Tensor:
        """What is multiplied by between compression and decompression."""
        return self.m

    def _product(self, x: Tensor, m: Tensor) -> Tensor:
        r = m.shape[0]
        x = _filled(x, r)
        o = x.sum(-2, keepdim=True) @ m.T if self.kind == "share" else _turned(x) @ m.T
        return o.flatten(-2)[..., torch.arange(self.fan_out, device=x.device) % (o.shape[-2] * r)]


class SquareChain(Square):
    """`dW x = decompress((past + at (x) M) compress(x))`: links that share in four ways in turn, all but M finished.

    compress gives 2r sums, of features that are r apart and of neighbours; decompress repeats the first r of its values
    along the output and each of the others for neighbours. Finished links that share in one way are one matrix, so a
    chain of any length needs as much room. Dropout is for M; what is finished counts as part of the weight.

    Args:
        m: M, `r x r`.
        past: the finished links, `2r x 2r`: the rows' halves are for values repeated and for neighbours, the columns'
            for sums of features apart and of neighbours.
        at: `2 x 2`, one at the quarter in which M acts, else zero.
        fan_out, fan_in: size of the weight.
        dropout: probability of zeroing an input feature of M's in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in", "dropout")

    def __init__(self, m: Tensor, past: Tensor, at: Tensor, fan_out: int, fan_in: int, dropout: float = 0.0) -> None:
        super().__init__(m, "share", fan_out, fan_in, dropout)
        if list(past.shape) != [2 * len(m)] * 2 or list(at.shape) != [2, 2]:
            shapes = f"{list(past.shape)} and {list(at.shape)}"
            raise ValueError(f"M {list(m.shape)} needs past of twice its sides and a 2 x 2 place, not {shapes}")
        self.past, self.at = nn.Parameter(past), nn.Parameter(at)
        frozen(self, "past", "at")

    def side(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return super().side(x)
        trained, finished = _placed(self.m, self.at), self.past
        return self._product(dropped(self, x), trained.to(x.dtype)) + self._product(x, finished.to(x.dtype))

    def _inner(self) -> Tensor:
        return self.past + _placed(self.m, self.at)

    def _product(self, x: Tensor, m: Tensor) -> Tensor:
        r = len(m) // 2
        o = torch.cat([_filled(x, r).sum(-2), _grouped(x, r)], dim=-1) @ m.T
        return o[..., torch.arange(self.fan_out, device=x.device) % r] + _spread(o[..., r:], self.fan_out)


@torch.no_grad()
def merge(m: Tensor, past: Tensor, at: Tensor) -> None:
    """Finish a link of a `SquareChain`, or of each in a stack, and begin another with nothing, in the next of the ways:
    apart and repeated, neighbours in both, neighbours repeated, apart for neighbours."""
    past.add_(_placed(m, at))
    m.zero_()
    at.copy_(at.flatten(-2)[..., [2, 3, 1, 0]].view_as(at))


def _placed(m: Tensor, at: Tensor) -> Tensor:
    """`at (x) M`, `... 2r x 2r`."""
    return (at[..., :, None, :, None] * m[..., None, :, None, :]).flatten(-2).flatten(-3, -2)


def _filled(x: Tensor, r: int) -> Tensor:
    """x in blocks, `... blocks x r`; what does not fill the last one continues with its first features."""
    width = x.shape[-1]
    blocks = -(-width // r)
    extra = torch.arange(blocks * r - width, device=x.device) % width
    return torch.cat([x, x[..., extra]], dim=-1).unflatten(-1, (blocks, r))


def _grouped(x: Tensor, r: int) -> Tensor:
    """Sums of neighbours, `... r`; the first groups have one more where r does not divide the width."""
    few, larger = divmod(x.shape[-1], r)
    first, second = x.split([larger * (few + 1), (r - larger) * few], dim=-1)
    groups = first.unflatten(-1, (larger, few + 1)), second.unflatten(-1, (r - larger, few))
    return torch.cat([group.sum(-1) for group in groups], dim=-1)


def _spread(o: Tensor, width: int) -> Tensor:
    """Each of r values for neighbours, `... width`: `_grouped`, transposed."""
    few, larger = divmod(width, o.shape[-1])
    first, second = o[..., :larger, None], o[..., larger:, None]
    return torch.cat([y.expand(*y.shape[:-1], n).flatten(-2) for y, n in ((first, few + 1), (second, few))], dim=-1)


def _turned(x: Tensor) -> Tensor:
    """Every block (`... x blocks x r`) turned by its position, pairs being r/2 apart, as rotary embeddings are."""
    blocks, r = x.shape[-2:]
    tables = _angles(blocks, r, torch.promote_types(x.dtype, torch.float32), x)
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _angles(blocks: int, r: int, dtype: torch.dtype, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the turn of every pair of every block, `blocks x r/2`."""
    rates = 10000 ** (-torch.arange(0, r, 2, dtype=dtype, device=like.device) / r)
    angles = torch.arange(blocks, dtype=dtype, device=like.device).unsqueeze(1) * rates
    return angles.cos(), angles.sin()


class _SquareLinear(torch.autograd.Function):
    """`x W^T + bias`, plus `scale` times the blocks of the kept x, continued by its first features, each multiplied by
    a matrix of its own and put side by side as often as the output is wide. W and bias are frozen; keeps x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        m: Tensor,
        made_of: Callable[[Tensor, torch.dtype], Tensor],
        scale: float,
        survive: Tensor | None,
    ) -> Tensor:
        ctx.scale, ctx.made_of = scale, made_of
        save(ctx, x if ctx.needs_input_grad[3] else None, survive, weight, m)
        blocks = made_of(m.detach(), x.dtype)
        pieces = _cut(branch_input(x, survive), blocks)
        made = torch.bmm(pieces, blocks).transpose(0, 1).flatten(1)
        y, rows = base_product(x, weight, bias)
        for start in range(0, rows.shape[1], made.shape[1]):
            part = rows[:, start : start + made.shape[1]]
            part.add_(made[:, : part.shape[1]], alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, weight, m = saved(ctx)
        with torch.enable_grad():
            m = m.detach().requires_grad_()
            traced = ctx.made_of(m, gradients[0].dtype)
        blocks = traced.detach()
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        count, r, _ = blocks.shape
        width = count * r
        slope = g[:, :width]
        if g.shape[1] < width:
            slope = nn.functional.pad(slope, (0, width - g.shape[1]))
        elif g.shape[1] > width:
            slope = slope.clone()
            for start in range(width, g.shape[1], width):
                part = g[:, start : start + width]
                slope[:, : part.shape[1]] += part
        pieces = slope.reshape(-1, count, r).transpose(0, 1).contiguous()
        dx = dm = None
        if ctx.needs_input_grad[3]:
            dblocks = torch.bmm(_cut(branch_input(x, survive), blocks).contiguous().mT, pieces).mul_(ctx.scale)
            (dm,) = torch.autograd.grad(traced, m, dblocks)
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            fan_in = dx.shape[1]
            made = torch.bmm(pieces, blocks.mT).transpose(0, 1).reshape(-1, width).mul_(ctx.scale)
            for start in range(0, width, fan_in):
                part = made[:, start : start + fan_in]
                columns = slice(part.shape[1])
                if survive is None:
                    dx[:, columns] += part
                else:
                    dx[:, columns] += part * survive.view_as(dx)[:, columns]
            dx = dx.view(*gradients[0].shape[:-1], fan_in)
        return dx, None, None, dm, None, None, None


def _cut(x: Tensor, blocks: Tensor) -> Tensor:
    """The first blocks of rows, `blocks x tokens x r`; rows that end too early continue with their first features."""
    width = blocks.shape[0] * blocks.shape[1]
    if width > x.shape[1]:
        x = x.repeat(1, -(-width // x.shape[1]))
    return x[:, :width].unflatten(1, blocks.shape[:2]).transpose(0, 1)
