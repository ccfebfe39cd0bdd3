"""Products with block-diagonal matrices, and a linear layer whose input is turned by one first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .output import gain_gradient, gained
from .products import strips
from .saving import save, saved

WORTHWHILE = 32
"""Side of a block from which on products of single blocks are fast."""


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
    """`x R` block by block: `... x in` by `blocks x b x b`, or by `1 x b x b` for all blocks alike."""
    r = joined(r, x.shape[-1] // r.shape[-1])
    pieces = x.reshape(-1, x.shape[-1] // r.shape[-1], r.shape[-1])
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
        y = _turned_product(x, weight, bias if s is None else None, r)
        kept = (None, None) if s is None else gained(ctx, y, s.to(x.dtype), bias, ctx.needs_input_grad[4])
        save(ctx, needed, weight, r, s, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, r, s, plain, out = saved(ctx)
        ds = dr = dx = None
        if ctx.needs_input_grad[4]:
            ds = gain_gradient(ctx, gradients[0], out, s)
            if ds is None:
                plain = _turned_product(x, weight, None, r) if plain is None else plain
                ds = (plain.view_as(gradients[0]) * gradients[0]).flatten(0, -2).sum(0).to(s.dtype)
        g = gradients[0].reshape(-1, len(weight))
        if ctx.needs_input_grad[0]:
            dx = g.new_empty(*gradients[0].shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[3]:
            dr = r.new_zeros(r.shape, dtype=torch.promote_types(r.dtype, torch.float32))
            x = x.reshape(-1, x.shape[-1])
        for some in strips(g):
            pieces = _pieces((g[some] if s is None else g[some] * s.to(g.dtype)) @ weight, r)
            if dr is not None:
                dr += _pieces(x[some], r).mT @ pieces
            if dx is not None:
                dx.view(-1, weight.shape[1])[some] = (pieces @ r.mT).transpose(0, 1).reshape(-1, weight.shape[1])
        return dx, None, None, None if dr is None else dr.to(r.dtype), ds


def _turned_product(x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor) -> Tensor:
    """`(x R) W^T + bias`, where nothing needs its gradient."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    rows, flat = y.view(-1, len(weight)), x.reshape(-1, x.shape[-1])
    for some in strips(rows):
        turned = turned_blocks(flat[some], r)
        if bias is None:
            torch.mm(turned, weight.T, out=rows[some])
        else:
            torch.addmm(bias, turned, weight.T, out=rows[some])
    return y


def _pieces(rows: Tensor, r: Tensor) -> Tensor:
    """`rows x in`, as R's blocks read them, `blocks x rows x b`, or `1 x (rows blocks) x b` for all blocks alike.

    Copied so that every block lies in one piece: products of many strided blocks are far slower.
    """
    b = r.shape[-1]
    return rows.reshape(1, -1, b) if len(r) == 1 else rows.view(-1, rows.shape[1] // b, b).transpose(0, 1).contiguous()
