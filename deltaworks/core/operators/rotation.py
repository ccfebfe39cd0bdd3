"""Orthogonal changes of what a layer reads: `W' = W R^T`, hence `y = (x R) W^T`.

`R` is `in x in` and never formed. The input is turned and the layer called as it is, so a quantised weight is never
unpacked and nothing as large as the weight is ever made; only where a delta must change the weight itself (a part of a
fused projection, experts, a convolution, merging) are the weight's rows turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta

WORTHWHILE = 32
"""Side of a block from which on products of single blocks are fast."""


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

    def units(self) -> Tensor:
        """The unit vectors, `in x r`."""
        if not self.orthogonal:
            return self.u / self.u.norm(dim=0)
        columns: list[Tensor] = []
        for column in self.u.unbind(1):
            for done in columns:
                column = column - (done @ column) * done
            columns.append(column / column.norm())
        return torch.stack(columns, dim=1)

    def turned(self, x: Tensor, *, back: bool = False) -> Tensor:
        with _exact(self.u):
            u = self.units()
            one = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
            core = 2 * one if self.orthogonal else torch.linalg.inv(torch.triu(u.T @ u, 1) + one / 2)
        u, core = u.to(x.dtype), core.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        return torch.addmm(flat, flat @ u @ (core if back else core.T), u.T, alpha=-1).view(x.shape)


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
    result = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device) + 2 * skew
    power = skew
    for last in range(2, terms):
        power = power @ skew
        result = result + (power if last == terms - 1 else 2 * power)
    return result


class BlockRotation(Rotation):
    """`R = blockdiag(R_1, R_2, ...)`, each `b x b` and made of a skew-symmetric matrix.

    Args:
        k: the entries above the diagonal, row by row, of each block's matrix: `blocks x b (b - 1) / 2`; one row where
        all
            blocks share one rotation.
        block: b.
        width: in.
        terms: number of terms of the Neumann series, None for the exact Cayley transform.
    """

    settings: ClassVar[tuple[str, ...]] = ("block", "width", "terms")

    def __init__(self, k: Tensor, block: int, width: int, terms: int | None = None) -> None:
        super().__init__()
        if width % block or k.shape not in ((width // block, block * (block - 1) // 2), (1, block * (block - 1) // 2)):
            raise ValueError(f"{list(k.shape)} values make no rotations of {block} features each of {width}")
        self.k = nn.Parameter(k)
        self.block, self.width, self.terms = block, width, terms

    def rotations(self) -> Tensor:
        """The blocks, `blocks x b x b` (`1 x b x b` where shared)."""
        rows, columns = torch.triu_indices(self.block, self.block, 1, device=self.k.device)
        upper = self.k.new_zeros(len(self.k), self.block**2).index_copy(1, rows * self.block + columns, self.k)
        upper = upper.unflatten(1, (self.block, self.block))
        with _exact(upper):
            skew = upper - upper.mT
            return cayley(skew) if self.terms is None else neumann(skew, self.terms)

    def strain(self, eps: float) -> Tensor:
        """`||K||_F sqrt(blocks) / eps` of every block, `blocks x 1`; COFT wants at most 1."""
        # Every entry above the diagonal stands a second time, negated, below it.
        return math.sqrt(2 * len(self.k)) / eps * self.k.detach().norm(dim=1, keepdim=True)

    @torch.no_grad()
    def leash(self, eps: float) -> None:
        """Project every block's skew-symmetric matrix back onto `||K||_F <= eps / sqrt(blocks)`."""
        self.k.div_(self.strain(eps).clamp(min=1))

    def turned(self, x: Tensor, *, back: bool = False) -> Tensor:
        r = self.rotations().to(x.dtype)
        return turned_blocks(x.unflatten(-1, (-1, self.block)), r.mT if back else r).flatten(-2)


class Butterfly(Rotation):
    """`W' = s (W R^T)`, `R = M_(m-1) ... M_0`: stage `i` turns half-blocks `h` and `h + 2^i` together.

    Args:
        p: `m x blocks x b x b`; the skew part of each matrix makes its rotation.
        s: `out`, scales of the output features.
    """

    def __init__(self, p: Tensor, s: Tensor) -> None:
        super().__init__()
        if p.dim() != 4 or p.shape[2] != p.shape[3] or (p.shape[0] > 1 and (p.shape[1] % 2 ** (p.shape[0] - 1))):
            raise ValueError(f"matrices of shape {list(p.shape)} make no butterfly")
        self.p, self.s = nn.Parameter(p), nn.Parameter(s)

    def turned(self, x: Tensor, *, back: bool = False) -> Tensor:
        # The sign under which m = 1 agrees with the field's other implementation.
        with _exact(self.p):
            r = cayley((self.p.mT - self.p) / 2).to(x.dtype)
        order = range(len(r)) if back else reversed(range(len(r)))
        for i in order:
            x = _stage(x, r[i].mT if back else r[i], i)
        return x

    def fold(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (self.turned(wide, back=True) * self.s.to(wide.dtype).unsqueeze(-1)).to(weight.dtype)

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        y, bias = call(self.turned(x)), weight.bias()
        s = self.s.to(y.dtype)
        return y * s if bias is None else torch.addcmul(bias - bias * s, y, s)  # the bias is not scaled


def turned_blocks(x: Tensor, r: Tensor) -> Tensor:
    """`x R` block by block: `... x blocks x b` by `blocks x b x b`, or by `1 x b x b` for all blocks alike."""
    blocks, b = x.shape[-2:]
    # Many tiny products are slower than fewer of some size, even with zeros in them.
    several = max(d for d in range(1, max(WORTHWHILE // b, 1) + 1) if blocks % d == 0)
    if several > 1:
        one = torch.eye(several, dtype=r.dtype, device=r.device).view(1, several, 1, several, 1)
        wide = r.view(-1, 1 if len(r) == 1 else several, b, 1, b) * one
        r = wide.reshape(-1, several * b, several * b)
    joined = x.reshape(-1, blocks // several, several * b)
    turned = joined @ r[0] if len(r) == 1 else torch.bmm(joined.transpose(0, 1), r).transpose(0, 1)
    return turned.reshape(x.shape)


def _stage(x: Tensor, r: Tensor, i: int) -> Tensor:
    half = r.shape[-1] // 2
    if i == 0:
        return turned_blocks(x.unflatten(-1, (-1, r.shape[-1])), r).flatten(-2)
    paired = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2)
    done = turned_blocks(paired.flatten(-2).flatten(-3, -2), r)
    return done.unflatten(-2, (-1, 2**i)).unflatten(-1, (2, half)).transpose(-3, -2).flatten(-4)
