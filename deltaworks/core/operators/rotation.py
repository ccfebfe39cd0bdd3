"""Orthogonal changes of what a layer reads: `W' = W R^T`, hence `y = (x R) W^T`.

`R` is `in x in` and never formed. The input is turned and the layer called as it is, so a quantised weight is never
unpacked and nothing as large as the weight is ever made; only where a delta must change the weight itself (a part of a
fused projection, experts, a convolution, merging) are the weight's rows turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta
from .low_rank import base_product, plain
from .recompute import recomputed
from .saving import save, saved
from .turning import joined, turned_blocks, turned_linear


class Rotation(Delta):
    """Base of the orthogonal operators; a subclass defines `turned`."""

    additive = False
    lean = True

    def turned(self, x: Tensor, *, back: bool = False) -> Tensor:
        """`x R` for `x` of shape `... x in`, or `x R^T`."""
        raise NotImplementedError

    def fold(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.turned(wide, back=True).to(weight.dtype)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # A part of a fused projection reads the same input as the other parts, which must not be turned.
        return self.site.rows is None

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        return call(self.turned(x))


class Householder(Rotation):
    """`W' = W H_1 H_2 ... H_r`, `H_i = I - 2 u_i u_i^T`, in the compact form `I - U T U^T` with a triangular `T`.

    Args:
        u: `in x r`; its columns are normalised when used.
        orthogonal: make the columns orthogonal by Gram-Schmidt first, `W' = W (I - 2 U U^T)`.
    """

    settings: ClassVar[tuple[str, ...]] = ("orthogonal",)

    def __init__(self, u: Tensor, orthogonal: bool = False) -> None:
        super().__init__()
        self.u = nn.Parameter(u)
        self.orthogonal = orthogonal

    def _units(self, u: Tensor) -> Tensor:
        if not self.orthogonal:
            return units(u)
        columns: list[Tensor] = []
        for column in u.unbind(1):
            for done in columns:
                column = column - (done @ column) * done
            columns.append(column / column.norm())
        return torch.stack(columns, dim=1)

    def compact(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The unit vectors U and the core C of `R = I - U C U^T`, made of `in x r`."""
        with _exact(u):
            u = self._units(u)
            one = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
            return u, 2 * one if self.orthogonal else torch.linalg.inv(torch.triu(u.T @ u, 1) + one / 2).T

    def turned(self, x: Tensor, *, back: bool = False) -> Tensor:
        u, core = (tensor.to(x.dtype) for tensor in self.compact(self.u))
        flat = x.reshape(-1, x.shape[-1])
        return torch.addmm(flat, flat @ u @ (core.T if back else core), u.T, alpha=-1).view(x.shape)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not plain(self, x) or weight.dtype != x.dtype:
            return None
        return _ReflectedLinear.apply(x, weight, bias, self, self.u)  # type: ignore[return-value]


def units(u: Tensor) -> Tensor:
    """The columns of `... x in x r` at length one."""
    return u / u.norm(dim=-2, keepdim=True)


class _ReflectedLinear(torch.autograd.Function):
    """`(x - x U C U^T) W^T + bias`, W and bias frozen; keeps x and `x U`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, part: Householder, raw: Tensor) -> Tensor:
        exact_u, exact_core = part.compact(raw.detach())
        u, core = exact_u.to(x.dtype), exact_core.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        z = flat @ u
        ctx.part = part
        save(ctx, x if ctx.needs_input_grad[4] else None, z, weight, raw, exact_core)
        return base_product(torch.addmm(flat, z @ core, u.T, alpha=-1).view(x.shape), weight, bias)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, z, weight, raw, exact_core = saved(ctx)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        with torch.enable_grad():
            raw = raw.detach().requires_grad_(ctx.part.orthogonal)
            exact_u = ctx.part._units(raw)
        u, core = exact_u.detach().to(g.dtype), exact_core.to(g.dtype)
        pulled = g @ weight  # the gradient of what the layer reads
        p = pulled @ u
        dz = p @ core.T
        du = None
        if x is not None:
            # What U contributes on the way out, and what it does on the way in.
            du = ((z @ core).T @ pulled).add_(dz.T @ x.reshape(-1, x.shape[-1])).T.to(raw.dtype).neg()
            if ctx.part.orthogonal:
                (du,) = torch.autograd.grad(exact_u, raw, du)
            else:
                # C is the inverse of the strict upper triangle of U^T U with halves on its diagonal, transposed.
                dgram = torch.triu(exact_core @ (p.T @ z).to(raw.dtype) @ exact_core, 1)
                du = torch.addmm(du, exact_u, dgram + dgram.T)
                du = (du - exact_u * (exact_u * du).sum(0)) / raw.norm(dim=0)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = pulled.addmm_(dz, u.T, alpha=-1).view(*gradients[0].shape[:-1], weight.shape[-1])
        return dx, None, None, None, du


def _exact(tensor: Tensor) -> AbstractContextManager:
    """Rotations are made in full precision whatever the model computes in, or they would not be rotations."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def cayley(skew: Tensor) -> Tensor:
    """`(I + K)(I - K)^-1` of skew-symmetric matrices (`... x b x b`): orthogonal, near `I + 2 K`."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(one - skew, one + skew)


def neumann(skew: Tensor, terms: int) -> Tensor:
    """The first terms of the Cayley series, `I + 2 K + 2 K^2 + ... + 2 K^(terms-2) + K^(terms-1)`."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if terms == 5:  # two products instead of three
        square = skew @ skew
        return one + 2 * skew + square @ (2 * (one + skew) + square)
    result, power = one + 2 * skew, skew
    for last in range(2, terms):
        power = power @ skew
        result = result + (power if last == terms - 1 else 2 * power)
    return result


class BlockRotation(Rotation):
    """`R = blockdiag(R_1, R_2, ...)`, each `b x b` and made of a skew-symmetric matrix.

    Args:
        k: the entries above the diagonal, row by row, of each block's matrix: `blocks x b (b - 1) / 2`; one row where
            all blocks share one rotation.
        block: b.
        width: in.
        terms: number of terms of the Neumann series, None for the exact Cayley transform.
        dropout: share of the blocks that turn nothing, drawn in every call in training; an only block always turns.
    """

    settings: ClassVar[tuple[str, ...]] = ("block", "width", "terms", "dropout")

    def __init__(self, k: Tensor, block: int, width: int, terms: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        if width % block or k.shape not in ((width // block, block * (block - 1) // 2), (1, block * (block - 1) // 2)):
            raise ValueError(f"{list(k.shape)} values make no rotations of {block} features each of {width}")
        self.k = nn.Parameter(k)
        self.block, self.width, self.terms = block, width, terms

    def rotations(self) -> Tensor:
        """The blocks, `blocks x b x b` (`1 x b x b` where shared)."""
        return self._rotations(self.k)

    def _rotations(self, k: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(self.block, self.block, 1, device=k.device)
        upper = k.new_zeros(len(k), self.block**2).index_copy(1, rows * self.block + columns, k)
        upper = upper.unflatten(1, (self.block, self.block))
        with _exact(upper):
            skew = upper - upper.mT
            return cayley(skew) if self.terms is None else neumann(skew, self.terms)

    def turned(self, x: Tensor, *, back: bool = False, spare: Tensor | None = None) -> Tensor:
        r = _without(self.rotations(), spare).to(x.dtype)
        return turned_blocks(x, r.mT if back else r)

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        return call(self.turned(x, spare=_spared(self, len(self.k))))

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not plain(self, x) or weight.dtype != x.dtype:
            return None
        blocks, spare = self.width // self.block, _spared(self, len(self.k))
        dtype = x.dtype  # not x itself, which the function would keep
        r = recomputed(lambda k: joined(_without(self._rotations(k), spare).to(dtype), blocks), self.k)
        return turned_linear(x, weight, bias, r)


def strain(k: Tensor, eps: float) -> Tensor:
    """`||K||_F sqrt(blocks) / eps` of every block, `... x blocks x 1`; COFT wants at most 1.

    Args:
        k: as `BlockRotation` holds it, for several experts with a leading axis.
        eps: the bound.
    """
    # Every entry above the diagonal stands a second time, negated, below it.
    return math.sqrt(2 * k.shape[-2]) / eps * k.detach().norm(dim=-1, keepdim=True)


@torch.no_grad()
def leash(k: Tensor, eps: float) -> None:
    """Project every block's skew-symmetric matrix back onto `||K||_F <= eps / sqrt(blocks)`, in place."""
    k.div_(strain(k, eps).clamp(min=1))


def _spared(part: Any, blocks: int) -> Tensor | None:
    """Which of some blocks a part's dropout spares this time, `blocks x 1 x 1`; None where it spares none.

    Their share is the dropout's on average: what it has beyond whole blocks is the probability of one more.
    """
    if not (part.dropout and part.training) or blocks == 1:
        return None
    device = next(part.parameters()).device
    number = (part.dropout * blocks + torch.rand((), device=device)).floor()
    return (torch.randperm(blocks, device=device) < number).view(-1, 1, 1)


def _without(r: Tensor, spare: Tensor | None) -> Tensor:
    """Rotations (`blocks x b x b`), some of which are left out."""
    return r if spare is None else torch.where(spare, torch.eye(r.shape[-1], dtype=r.dtype, device=r.device), r)


class Butterfly(Rotation):
    """`W' = s (W R^T)`, `R = M_(m-1) ... M_0`: stage `i` turns half-blocks `h` and `h + 2^i` together.

    Args:
        p: `m x blocks x b x b`; the skew part of each matrix makes its rotation.
        s: `out`, scales of the output features.
        dropout: share of the blocks of one stage that turn nothing, stage and blocks drawn in every call in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("dropout",)

    def __init__(self, p: Tensor, s: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        if p.dim() != 4 or p.shape[2] != p.shape[3] or (p.shape[0] > 1 and (p.shape[1] % 2 ** (p.shape[0] - 1))):
            raise ValueError(f"matrices of shape {list(p.shape)} make no butterfly")
        self.p, self.s = nn.Parameter(p), nn.Parameter(s)

    def turned(self, x: Tensor, *, back: bool = False, spare: Tensor | None = None) -> Tensor:
        r = self._rotations(self.p)
        if spare is not None:
            stage = int(torch.randint(len(r), ()))
            r = torch.stack([_without(one, spare) if i == stage else one for i, one in enumerate(r)])
        r = r.to(x.dtype)
        order = range(len(r)) if back else reversed(range(len(r)))
        for i in order:
            x = _stage(x, r[i].mT if back else r[i], i)
        return x

    def fold(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (self.turned(wide, back=True) * self.s.to(wide.dtype).unsqueeze(-1)).to(weight.dtype)

    def _rotations(self, p: Tensor) -> Tensor:
        # The sign under which m = 1 agrees with the field's other implementation.
        with _exact(p):
            return cayley((p.mT - p) / 2)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if len(self.p) > 1 or not plain(self, x) or weight.dtype != x.dtype:
            return None
        blocks = self.p.shape[1]
        spare = _spared(self, blocks)
        dtype = x.dtype  # not x itself, which the function would keep
        r = recomputed(lambda p: joined(_without(self._rotations(p[0]), spare).to(dtype), blocks), self.p)
        return turned_linear(x, weight, bias, r, self.s)

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        y, bias = call(self.turned(x, spare=_spared(self, self.p.shape[1]))), weight.bias()
        s = self.s.to(y.dtype)
        return y * s if bias is None else torch.addcmul(bias - bias * s, y, s)  # the bias is not scaled


def _stage(x: Tensor, r: Tensor, i: int) -> Tensor:
    half = r.shape[-1] // 2
    if i == 0:
        return turned_blocks(x, r)
    paired = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2)
    done = turned_blocks(paired.flatten(-4), r)
    return done.unflatten(-1, (-1, 2**i, 2, half)).transpose(-3, -2).flatten(-4)
