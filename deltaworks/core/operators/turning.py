"""Products with block-diagonal matrices, and a linear layer whose input is turned by one first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .low_rank import base_product
from .output import gain_gradient, gained
from .saving import save, saved

WORTHWHILE = 32
"""Side of a block from which on products of single blocks are fast."""
STRIP = 1024
"""Rows that a CPU turns at a time."""


def joined(r: Tensor, blocks: int) -> Tensor:
    """The same block-diagonal matrix in fewer and wider blocks, with zeros in them, where `r`'s are tiny.

    Args:
        r: `blocks x b x b`, or `1 x b x b` for all blocks alike.
        blocks: their number.

    Returns:
        `blocks/k x k b x k b`, or `1 x k b x k b`.
    """
    b = r.shape[-1]
    several = max(d for d in range(1, max(WORTHWHILE // b, 1) + 1) if blocks % d == 0)
    if several == 1:
        return r
    one = torch.eye(several, dtype=r.dtype, device=r.device).view(1, several, 1, several, 1)
    wide = r.view(-1, 1 if len(r) == 1 else several, b, 1, b) * one
    return wide.reshape(-1, several * b, several * b)


def turned_blocks(x: Tensor, r: Tensor) -> Tensor:
    """`x R` block by block: `... x blocks x b` by `blocks x b x b`, or by `1 x b x b` for all blocks alike."""
    r = joined(r, x.shape[-2])
    pieces = x.reshape(-1, x.shape[-2] * x.shape[-1] // r.shape[-1], r.shape[-1])
    turned = pieces @ r[0] if len(r) == 1 else torch.bmm(pieces.transpose(0, 1), r).transpose(0, 1)
    return turned.reshape(x.shape)


def turned_linear(x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, s: Tensor | None = None) -> Tensor:
    """`diag(s) W (x R)` for a block-diagonal R, plus a bias that s does not scale; W and the bias are frozen.

    Args:
        x: `... x in`.
        weight: W, `out x in`.
        bias: `out`, or None.
        r: blocks of R, `blocks x b x b` or `1 x b x b`, in x's dtype.
        s: `out`, or None for all one.
    """
    return _TurnedLinear.apply(x, weight, bias, r, s)  # type: ignore[return-value]


class _TurnedLinear(torch.autograd.Function):
    """Keeps x (for R) and, for s, the output, or where that does not tell (`gained`) the product it scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, s: Tensor | None) -> Tensor:
        needed = x if ctx.needs_input_grad[3] or ctx.needs_input_grad[4] else None
        turned = _turned(x, r)
        if s is None:
            save(ctx, needed, weight, r, s, None, None)
            return base_product(turned, weight, bias)[0]
        y, _ = base_product(turned, weight, None)
        save(ctx, needed, weight, r, s, *gained(ctx, y, s.to(x.dtype), bias, ctx.needs_input_grad[4]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, r, s, plain, out = saved(ctx)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        ds = dr = dx = None
        if s is not None:
            if ctx.needs_input_grad[4]:
                ds = gain_gradient(ctx, gradients[0], out, s)
                if ds is None:
                    plain = _turned(x, r).reshape(-1, x.shape[-1]) @ weight.T if plain is None else plain
                    ds = (plain * g).sum(0).to(s.dtype)
            g = g * s.to(g.dtype)
        pulled = g @ weight
        if ctx.needs_input_grad[3]:
            x, dr = x.reshape(pulled.shape), r.new_zeros(r.shape, dtype=torch.promote_types(r.dtype, torch.float32))
        for some in _strips(pulled):
            pieces = _pieces(pulled[some], r)
            if dr is not None:
                dr += _pieces(x[some], r).mT @ pieces
            if ctx.needs_input_grad[0]:
                pulled[some] = (pieces @ r.mT).transpose(0, 1).reshape(-1, pulled.shape[1])
        if ctx.needs_input_grad[0]:
            dx = pulled.view(*gradients[0].shape[:-1], -1)
        return dx, None, None, None if dr is None else dr.to(r.dtype), ds


def _turned(x: Tensor, r: Tensor) -> Tensor:
    """`x R` of `... x in`, where nothing needs its gradient."""
    rows = x.reshape(-1, x.shape[-1])
    turned = torch.empty_like(rows)
    for some in _strips(rows):
        turned[some] = turned_blocks(rows[some].unflatten(-1, (-1, r.shape[-1])), r).flatten(-2)
    return turned.view(x.shape)


def _strips(rows: Tensor) -> list[slice]:
    """Which rows to turn at a time: what their products need beside them, three copies, is as large as those only."""
    step = STRIP if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(low, low + step) for low in range(0, len(rows), step)]


def _pieces(rows: Tensor, r: Tensor) -> Tensor:
    """`rows x in`, as R's blocks read them, `blocks x rows x b`, or `1 x (rows blocks) x b` for all blocks alike.

    Copied so that every block lies in one piece: products of many strided blocks are far slower.
    """
    b = r.shape[-1]
    return rows.reshape(1, -1, b) if len(r) == 1 else rows.view(-1, rows.shape[1] // b, b).transpose(0, 1).contiguous()
