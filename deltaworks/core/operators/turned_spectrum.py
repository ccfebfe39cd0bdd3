"""The weight's spectrum shifted and its input rotated by a Kronecker product: `W' = U relu(S + shift) V^T O^T`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from .low_rank import base_product, plain
from .products import over_batch
from .saving import save, saved
from .singular import Singular


class TurnedSpectrum(Singular):
    """`W' = (W + U diag(relu(S + shift) - S) V^T) O^T`, `O = Q1 kron Q2 kron Q3`.

    The input is turned, axis by axis, and the layer called on it; neither O nor W' is built.

    Args:
        shift: what is added to the singular values, `min(in, out)`.
        q1, q2, q3: square, orthogonal; their sides multiply to `in`.
        prints, fan_out, fan_in: see `Singular`.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in")
    additive = False
    lean = True

    def __init__(
        self, shift: Tensor, q1: Tensor, q2: Tensor, q3: Tensor, prints: Tensor, fan_out: int, fan_in: int
    ) -> None:
        super().__init__(prints, fan_out, fan_in)
        if len(q1) * len(q2) * len(q3) != fan_in or shift.shape != prints.shape:
            sides = [len(q) for q in (q1, q2, q3)]
            given = f"rotations of sides {sides} and {list(shift.shape)} shifts"
            raise ValueError(f"{given} do not fit a weight of {fan_out} x {fan_in}")
        self.shift = nn.Parameter(shift)
        self.q1, self.q2, self.q3 = nn.Parameter(q1), nn.Parameter(q2), nn.Parameter(q3)

    def change(self) -> Tensor:
        """What is added to the singular values; none can become negative."""
        if self.s is None:
            raise RuntimeError("the singular values are not there yet; they are found when an adapter is attached")
        return torch.relu(self.s.to(self.shift.dtype) + self.shift) - self.s.to(self.shift.dtype)

    def turned(self, x: Tensor, *, back: bool = False) -> Tensor:
        """`x O` (or `x O^T`) for x of shape `... x in`."""
        return turned(x, (self.q1, self.q2, self.q3), back=back)

    def fold(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, self.shift.dtype))
        if self.u is not None:
            vh, u = self.vectors()
            wide = wide + (u.to(wide.dtype) * self.change()) @ vh.to(wide.dtype)
        return self.turned(wide, back=True).to(weight.dtype)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # A part of a fused projection reads the same input as the other parts, which must not be turned.
        return self.site.rows is None

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        vh, u = self.vectors()
        x = self.turned(x)
        y = call(x)
        return y + (((x @ vh.to(x.dtype).T) * self.change().to(x.dtype)) @ u.to(x.dtype).T).to(y.dtype)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not plain(self, x) or weight.dtype != x.dtype:
            return None
        inner = torch.kron(self.q2, self.q3).to(x.dtype)
        return _TurnedLinear.apply(x, weight, bias, self.change(), self.q1.to(x.dtype), inner, self.vectors)  # type: ignore[return-value]


class TurnedFactor(Singular):
    """`W' = (L + B A) Qb O^T` with `W = L Qb`, L lower triangular and Qb of orthonormal rows, `O = Q1 kron Q2 kron Q3`.

    The input is turned and the layer called on it, the low-rank term reads the turned input through Qb.

    Args:
        a: `rank x min(in, out)`.
        b: `out x rank`.
        q1, q2, q3: square, orthogonal; their sides multiply to `in`.
        prints, fan_out, fan_in: see `Singular`; Qb stands in the place of V^T.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in")
    additive = False
    lean = True

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        q1: Tensor,
        q2: Tensor,
        q3: Tensor,
        prints: Tensor,
        fan_out: int,
        fan_in: int,
    ) -> None:
        super().__init__(prints, fan_out, fan_in)
        sides = [len(q) for q in (q1, q2, q3)]
        if sides[0] * sides[1] * sides[2] != fan_in or a.shape[1] != len(prints) or b.shape != (fan_out, len(a)):
            given = f"rotations of sides {sides}, A {list(a.shape)} and B {list(b.shape)}"
            raise ValueError(f"{given} do not fit a weight of {fan_out} x {fan_in}")
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.q1, self.q2, self.q3 = nn.Parameter(q1), nn.Parameter(q2), nn.Parameter(q3)

    def found(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, r = torch.linalg.qr(weight.mT)
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        signs = torch.where(diagonal < 0, -1.0, 1.0).to(diagonal)
        # L itself is in the weight.
        return weight.new_empty(*weight.shape[:-1], 0), diagonal * signs, (q * signs.unsqueeze(-2)).mT

    def turned(self, x: Tensor, *, back: bool = False) -> Tensor:
        """`x O` (or `x O^T`) for x of shape `... x in`."""
        return turned(x, (self.q1, self.q2, self.q3), back=back)

    def fold(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, self.a.dtype))
        if self.u is not None:
            wide = wide + (self.b @ self.a).to(wide.dtype) @ self.vectors()[0].to(wide.dtype)
        return self.turned(wide, back=True).to(weight.dtype)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # A part of a fused projection reads the same input as the other parts, which must not be turned.
        return self.site.rows is None

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        x = self.turned(x)
        y, rows = call(x), self.vectors()[0]
        return y + (x @ rows.to(x.dtype).T @ self.a.to(x.dtype).T @ self.b.to(x.dtype).T).to(y.dtype)


def turned(x: Tensor, rotations: tuple[Tensor, Tensor, Tensor], *, back: bool = False) -> Tensor:
    """`x (Q1 kron Q2 kron Q3)`, or its transpose, for x of shape `... x in`; the product is not built."""
    turns = [q.to(x.dtype).mT if back else q.to(x.dtype) for q in rotations]
    blocks = x.unflatten(-1, [q.shape[-1] for q in turns])
    return torch.einsum("...abc,ad,be,cf->...def", blocks, *turns).flatten(-3)


class _TurnedLinear(torch.autograd.Function):
    """`x O (W + U diag(c) V^T)^T + bias`, `O = q1 kron inner`; W, bias, U and V are constant. Keeps x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        c: Tensor,
        q1: Tensor,
        inner: Tensor,
        vectors: Callable[[], tuple[Tensor, Tensor]],
    ) -> Tensor:
        ctx.vectors = vectors
        save(ctx, x, weight, c, q1, inner)
        vh, u = (tensor.to(x.dtype) for tensor in vectors())
        read = _two_turns(x, q1, inner)[1]
        y, rows = base_product(read.view(x.shape), weight, bias)
        rows.addmm_((read @ vh.T).mul_(c.to(x.dtype)), u.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, c, q1, inner = saved(ctx)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        vh, u = (tensor.to(g.dtype) for tensor in ctx.vectors())
        half, read = _two_turns(x, q1, inner)
        gz = g @ u
        dc = (read @ vh.T).mul_(gz).sum(0).to(c.dtype)
        pulled = (g @ weight).addmm_(gz.mul_(c.to(g.dtype)), vh)
        n, m = len(q1), len(inner)
        blocks = pulled.view(-1, n, m)
        dhalf = (q1 @ blocks).view(-1, m)
        dq1 = over_batch(half.view(-1, n, m), blocks)
        dinner = x.reshape(-1, m).T @ dhalf
        dx = (dhalf @ inner.T).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, dc, dq1, dinner, None


def _two_turns(x: Tensor, q1: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """`x (I kron inner)` and `x (q1 kron inner)`, each `tokens x in`."""
    # Detached, since matmul chooses its kernel by what requires a gradient: frozen must give the same bits.
    half = x.detach().reshape(-1, len(inner)) @ inner.detach()
    whole = q1.detach().T @ half.view(-1, len(q1), len(inner))
    return half, whole.view(-1, x.shape[-1])
