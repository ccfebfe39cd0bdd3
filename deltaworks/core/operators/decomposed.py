"""The weight-decomposed operator: a trained magnitude for every output times the direction of a changed weight.

`W' = m (W + s B A) / c`, with `c` the norms of the rows of `W + s B A`, taken as constants by autograd. Neither
`W + s B A` nor its gradient is ever formed: the norms come from `||W_i||^2`, `W A^T` and `A A^T`, and the product from
the base's own output.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta
from .low_rank import add_back, base_product, branch_input, dropped, kept, narrow_gradient, plain
from .made import constant
from .output import gain_gradient, gained
from .saving import save, saved


class Decomposed(Delta):
    """`W' = diag(m / c) (W + scale B A)`.

    Args:
        magnitude: m, one value an output.
        a: `rank x in`.
        b: `out x rank`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training; the base sees them all.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    additive = False
    lean = True

    def __init__(self, magnitude: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or magnitude.shape != b.shape[:1]:
            shapes = f"m {list(magnitude.shape)}, A {list(a.shape)} and B {list(b.shape)}"
            raise ValueError(f"{shapes} do not fit; m has one value an output, A is r x in, B out x r")
        self.magnitude, self.a, self.b = nn.Parameter(magnitude), nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = float(scale), float(dropout)

    def fold(self, weight: Tensor) -> Tensor:
        changed = weight.to(torch.promote_types(weight.dtype, self.a.dtype)) + self.scale * (self.b @ self.a)
        norms = torch.linalg.vector_norm(changed.detach(), dim=-1)
        return ((self.magnitude / _nonzero(norms)).unsqueeze(-1) * changed).to(weight.dtype)

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """c, the norms of the rows of `weight + scale B A`, without building the sum."""
        a, b = self.a, self.b
        own = _squares(weight, torch.promote_types(weight.dtype, a.dtype))
        cross = ((weight @ a.to(weight.dtype).T).to(b.dtype) * b).sum(-1)
        change = ((b @ (a @ a.T)) * b).sum(-1)
        return _nonzero((own + 2 * self.scale * cross + self.scale**2 * change).clamp_min(0).sqrt())

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        bias = weight.bias()
        return self._turned(x, y if bias is None else y - bias.to(y.dtype), weight.matrix(), bias)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if weight.dtype != x.dtype:
            return None
        if not plain(self, x):
            return self._turned(x, nn.functional.linear(x, weight), weight, bias)
        survive, scale = kept(self, x)
        norms = self.norms(weight)
        return _TurnedLinear.apply(x, weight, bias, self.a, self.b, self.magnitude, norms, scale, survive)  # type: ignore[return-value]

    def _turned(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output from the base's product `y = x W^T`."""
        norms = self.norms(weight)
        if plain(self, x) and y.dtype == x.dtype:
            survive, scale = kept(self, x)
            return _Turn.apply(y, x, self.a, self.b, self.magnitude, norms, bias, scale, survive)  # type: ignore[return-value]
        branch = (dropped(self, x) @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T
        turned = (y + self.scale * branch.to(y.dtype)) * (self.magnitude / norms).to(y.dtype)
        return turned if bias is None else turned + bias.to(y.dtype)


def _squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`||W_i||^2` of every row."""

    def squares(weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).square()

    return constant(weight, dtype, squares, "squares of rows")


def _nonzero(norms: Tensor) -> Tensor:
    # A row of zeros has no direction; it stays zero instead of becoming 0 / 0.
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


class _TurnedLinear(torch.autograd.Function):
    """`diag(m / c) (x W^T + scale ((kept x) A^T) B^T) + bias`; keeps x (for A), x A^T (for B), and for m the output.

    Where the output does not tell (see `gained`) it keeps the bracket in its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        scale: float,
        survive: Tensor | None,
    ) -> Tensor:
        z = branch_input(x, survive) @ a.to(x.dtype).T
        y, rows = base_product(x, weight, None)
        rows.addmm_(z, b.to(x.dtype).T, alpha=scale)
        ctx.scale = scale
        direction, out = gained(ctx, y, (magnitude / norms).to(x.dtype), bias)
        save(ctx, x, survive, z, direction, out, weight, a, b, magnitude, norms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, z, direction, out, weight, a, b, magnitude, norms = saved(ctx)
        dm = gain_gradient(ctx, gradients[0], out, magnitude)
        if dm is None:
            if direction is None:
                direction = torch.mm(x.reshape(-1, x.shape[-1]), weight.T).addmm_(z, b.to(x.dtype).T, alpha=ctx.scale)
            dm = _magnitude_gradient(gradients[0], direction, magnitude, norms)
        g, gz, da, db = _turned_gradients(ctx, gradients[0], x, survive, z, a, b, magnitude, norms)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = add_back(g @ weight, gz, a, ctx.scale, survive).view(x.shape)
        dbias = gradients[0].flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, da, db, dm, None, None, None


def _turned_gradients(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    survive: Tensor | None,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
) -> tuple[Tensor, ...]:
    """The gradient of the bracket, the same times B (without the scale), dA and dB."""
    g = gradient.reshape(-1, gradient.shape[-1])
    g = g * (magnitude / norms).to(g.dtype)
    gz = g @ b.to(g.dtype)
    da = narrow_gradient(gz, branch_input(x, survive), ctx.scale, a.dtype)
    db = narrow_gradient(z, g, ctx.scale, b.dtype).T
    return g, gz, da, db


def _magnitude_gradient(gradient: Tensor, direction: Tensor, magnitude: Tensor, norms: Tensor) -> Tensor:
    """dm from the bracket, `tokens x out`."""
    sums = (gradient.reshape(direction.shape) * direction).sum(0)
    return (sums.to(norms.dtype) / norms).to(magnitude.dtype)


class _Turn(torch.autograd.Function):
    """`diag(m / c) (y + scale ((kept x) A^T) B^T) + bias`; keeps the bracket (for m), x (for A) and x A^T (for B)."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        bias: Tensor | None,
        scale: float,
        survive: Tensor | None,
    ) -> Tensor:
        z = branch_input(x, survive) @ a.to(x.dtype).T
        direction = torch.addmm(y.reshape(-1, y.shape[-1]), z, b.to(x.dtype).T, alpha=scale)
        # Not a view: models add residuals to a layer's output in place.
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        rows = out.view(direction.shape)
        gain = (magnitude / norms).to(x.dtype)
        ctx.scale = scale
        save(ctx, x, survive, z, direction, a, b, magnitude, norms)
        torch.mul(direction, gain, out=rows)
        return out if bias is None else out.add_(bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, z, direction, a, b, magnitude, norms = saved(ctx)
        dm = _magnitude_gradient(gradients[0], direction, magnitude, norms)
        g, gz, da, db = _turned_gradients(ctx, gradients[0], x, survive, z, a, b, magnitude, norms)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = (gz @ a.to(g.dtype)).mul_(ctx.scale).view(x.shape)
            dx = dx if survive is None else dx.mul_(survive)
        dbias = gradients[0].flatten(0, -2).sum(0) if ctx.needs_input_grad[6] else None
        return g.view(gradients[0].shape), dx, da, db, dm, None, dbias, None, None
