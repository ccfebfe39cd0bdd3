"""The low-rank operator: `dW = scale * B A`, the form most weight deltas share.

`A` is `rank x in`, `B` is `out x rank`. The product `B A` is never formed in training. One autograd function computes
the base product and the branch, adds in place, and keeps `x` (only if A trains) and `x A^T` (only if B trains).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight, is_ordinary
from ..part import Delta
from .saving import save, saved

FEW = 1 << 16
"""Elements of a layer's input and output up to which, on a CPU, products with thin factors are made in the factors'
precision, and by every layer for itself."""


class Factored(Delta):
    """`dW = scale * B A` for whatever factors a subclass has, stored or computed.

    A subclass sets the attributes and defines `factors`; products with activations, embeddings and convolutions follow.

    Attributes:
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
        train_a: whether anything in A receives gradients.
    """

    lean = True
    scale: float
    dropout: float = 0.0
    train_a: bool = True

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (`rank x in`) and B (`out x rank`), differentiable where they train."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        a, b = self.factors()
        return self.scale * (b @ a)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # Dropout acts on the branch's input, and a frozen A is there so that the input need not be kept.
        if self.training and (self.dropout or not self.train_a):
            return True
        # Building costs r*out*in products plus writing out*in; the branch costs r*(out+in) per token.
        fan_out, fan_in = weight.shape[-2:]
        return tokens * (fan_in + fan_out) < 2 * fan_in * fan_out or self.rank * 4 < min(fan_in, fan_out)

    def side(self, x: Tensor) -> Tensor:
        return _branch(self, x, *self.factors())

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return add_branch(self, x, y, *self.factors())

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return linear_with_branch(self, x, weight, bias, *self.factors())

    def shareable(self, x: Tensor) -> bool:
        """Whether the product with A may be had from another layer that reads `x`; dropout draws its own for each."""
        return (
            type(self).with_base is Factored.with_base
            and type(self).act is Factored.act
            and not (self.dropout and self.training)
            and plain(self, x)
        )

    def look_up(self, tokens: Tensor, layer: nn.Embedding) -> Tensor:
        """The change of an embedding's output, for token ids."""
        a, b = self.factors()
        return self.scale * (nn.functional.embedding(tokens, a.T, layer.padding_idx) @ b.T)

    def convolve(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The change of a convolution's output: a convolution to `rank` channels, then a pointwise one."""
        x = dropped(self, x)
        a, b = self.factors()
        kernel = a.to(x.dtype).unflatten(1, layer.weight.shape[1:])  # type: ignore[union-attr]
        functional = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[kernel.dim() - 2]
        if layer.groups != 1 or layer.padding_mode != "zeros":  # type: ignore[union-attr]
            return convolved(self.dense(), x, layer)
        z = functional(x, kernel, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[union-attr]
        return self.scale * functional(z, b.to(x.dtype).reshape(*b.shape, *[1] * (kernel.dim() - 2)))


def kept(part: Any, x: Tensor) -> tuple[Tensor | None, float]:
    """Which input features survive a part's dropout (None: all), and the scale that makes up for those that do not.

    One byte an element and no second copy of `x`, which is all that backward needs.
    """
    if not (part.dropout and part.training):
        return None, part.scale
    survive = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - part.dropout)
    return survive, part.scale / (1 - part.dropout)


def dropped(part: Any, x: Tensor) -> Tensor:
    """`x` after a part's dropout, for the paths that autograd differentiates."""
    return nn.functional.dropout(x, part.dropout) if part.dropout and part.training else x


def branch_input(x: Tensor, survive: Tensor | None) -> Tensor:
    """The branch's input as a matrix, `tokens x in`."""
    return (x if survive is None else x * survive).reshape(-1, x.shape[-1])


def thin_dtype(x: Tensor, a: Tensor, b: Tensor) -> torch.dtype:
    """In which precision a branch is made: x's, but for few tokens on a CPU that of the factors, if it is higher.

    A thin product in half precision takes a CPU some 50 us at least, longer than to cast few activations.
    """
    if x.dtype.itemsize > 2 or x.device.type != "cpu" or a.dtype != b.dtype:
        return x.dtype
    few = x.numel() // max(x.shape[-1], 1) * max(x.shape[-1], len(b)) <= FEW
    return torch.promote_types(x.dtype, a.dtype) if few else x.dtype


def is_quick(part: Factored, x: Tensor) -> bool:
    """Whether x is so small that its product with A costs less than to share one."""
    if x.numel() > FEW or x.device.type != "cpu":
        return False
    return x.dtype.itemsize > 2 or thin_dtype(x, *part.factors()) != x.dtype


def add_up(rows: Tensor, z: Tensor, b: Tensor, scale: float) -> None:
    """`rows += scale z b`, in z's precision."""
    if z.dtype == rows.dtype:
        rows.addmm_(z, b.to(z.dtype), alpha=scale)
    else:
        rows.add_(z @ b.to(z.dtype), alpha=scale)


def add_branch(part: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y + scale (x A^T) B^T` under a part's scale and dropout; `y` may be overwritten."""
    if plain(part, x) and y.dtype == x.dtype and y.is_contiguous():
        survive, scale = kept(part, x)
        return _LowRankAdd.apply(y, x, a, b, scale, survive)  # type: ignore[return-value]
    return y + _branch(part, x, a, b).to(y.dtype)


def linear_with_branch(
    part: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, shift: Tensor | None = None
) -> Tensor | None:
    """`x (W + shift)^T + bias + scale (x A^T) B^T` in one go; None where autograd must see the pieces.

    W, the shift (of any precision, `out x in`) and the bias are constants.
    """
    if not plain(part, x) or weight.dtype != x.dtype:
        return None
    survive, scale = kept(part, x)
    return _LowRankLinear.apply(x, weight, bias, a, b, scale, survive, shift)  # type: ignore[return-value]


def add_unwatched(part: Factored, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor | None:
    """`call(x) + scale (x A^T) B^T` where nothing is differentiated; None where the effective weight is leaner.

    The same as `with_base`, without what autograd would need: a token that is generated is little work, and much asking
    around it would show.
    """
    a, b = part.factors()
    fan_in, fan_out = x.shape[-1], len(b)
    if 4 * len(a) >= min(fan_in, fan_out) and x.numel() * (fan_in + fan_out) >= 2 * fan_in * fan_in * fan_out:
        return None
    y, rows = call(x), x.reshape(-1, fan_in)
    if len(rows) < len(a) and a.dtype != x.dtype:  # fewer activations to cast than factors
        return y.add_(((rows.to(a.dtype) @ a.T) @ b.T).view(y.shape), alpha=part.scale)
    z = rows @ a.to(x.dtype).T
    return y.reshape(-1, fan_out).addmm_(z, b.to(y.dtype).T, alpha=part.scale).view(y.shape)


def add_branches(parts: Sequence[Factored | None], x: Tensor, y: Tensor) -> Tensor:
    """`y` with every example's own `scale (x A^T) B^T` added, in two batched products; `y` may be overwritten.

    Args:
        parts: one for each example, None for none; without dropout.
        x: `examples x ... x in`.
        y: `examples x ... x out`.
    """
    own = list(dict.fromkeys(part for part in parts if part is not None))
    rank, lows, highs = max(part.rank for part in own), [], []
    for part in own:  # factors of a lower rank are filled up with zeros
        a, b = part.factors()
        lows.append(nn.functional.pad(a.to(x.dtype) * part.scale, (0, 0, 0, rank - len(a))))
        highs.append(nn.functional.pad(b.to(x.dtype), (0, rank - len(a))))
    low, high = torch.stack(lows), torch.stack(highs)
    rows = [row for row, part in enumerate(parts) if part is not None]
    which = torch.tensor([own.index(parts[row]) for row in rows], device=x.device)  # type: ignore[arg-type]
    index = None if len(rows) == len(parts) else torch.tensor(rows, device=x.device)
    mine = (x if index is None else x.index_select(0, index)).reshape(len(rows), -1, x.shape[-1])
    z, up = mine @ low[which].mT, high[which].mT
    if index is None:
        return y.reshape(len(rows), -1, y.shape[-1]).baddbmm_(z, up).view(y.shape)
    return y.index_add_(0, index, (z @ up).view(len(rows), *y.shape[1:]))


def lowered(x: Tensor, factors: Sequence[Tensor], scale: float) -> tuple[Tensor, ...]:
    """`x`, then `x A^T` for each of several A, as one product forward and one backward.

    Whoever goes on with the `x` that is returned, by `lifted` with the same scale, spares autograd a sum.
    """
    return _Lowered.apply(x, scale, *factors)  # type: ignore[return-value]


def lifted(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, scale: float) -> Tensor:
    """`x W^T + bias + scale z B^T` for what `lowered` gave, W and bias frozen."""
    return _Lifted.apply(x, z, weight, bias, b, scale)  # type: ignore[return-value]


def _branch(part: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    u = (dropped(part, x) @ a.to(x.dtype).T) @ b.to(x.dtype).T
    return u * part.scale if part.scale != 1.0 else u


def plain(delta: Delta, x: Tensor) -> bool:
    """Whether hand-written functions apply: eager, no autocast, no tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and not x.is_meta  # has no autocast to ask for
        and not torch.is_autocast_enabled(x.device.type)
        and unwrapped(delta)
        and is_ordinary(x)
    )


def unwrapped(module: nn.Module) -> bool:
    """Whether all parameters of a module are ordinary tensors."""
    # `parameters()` would take longer than the products of a small layer, and so would a generator.
    for parameter in module._parameters.values():
        if parameter is not None and not is_ordinary(parameter):
            return False
    return not module._modules or all(child is None or unwrapped(child) for child in module._modules.values())


class LowRank(Factored):
    """`dW = scale * (B A - B0 A0)`.

    `b0`, `a0` are frozen and present only for methods that start from part of the weight itself (PiSSA, OLoRA,
    LoRA-GA) or go on from finished factors (COLA): instead of moving the base to a residual, the start is subtracted.
    The base stays untouched, so detaching, stacking, switching and quantised bases need nothing special, and the result
    is an ordinary LoRA, of rank `2 r` for a start of rank `r`.

    Args:
        a: `rank x in`.
        b: `out x rank`.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
        a0, b0: what is subtracted, of any rank.
        train_a, train_b: whether a factor receives gradients.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout", "train_a", "train_b")

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        a0: Tensor | None = None,
        b0: Tensor | None = None,
        train_a: bool = True,
        train_b: bool = True,
    ) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise ValueError(f"factors {shapes} do not have one rank; A is r x in, B out x r")
        self.a = nn.Parameter(a, requires_grad=train_a)
        self.b = nn.Parameter(b, requires_grad=train_b)
        self.scale, self.dropout, self.train_a, self.train_b = float(scale), float(dropout), train_a, train_b
        self.a0 = None if a0 is None else nn.Parameter(a0, requires_grad=False)
        self.b0 = None if b0 is None else nn.Parameter(b0, requires_grad=False)

    @property
    def rank(self) -> int:
        return self.a.shape[0] + (0 if self.a0 is None else self.a0.shape[0])

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return torch.cat([self.a, self.a0]), torch.cat([self.b, -self.b0], dim=1)

    def dense(self) -> Tensor:
        if self.a0 is None or self.b0 is None:
            return super().dense()
        # Two products of equal factors differ by exactly nothing; one product of the joined factors would by rounding.
        return self.scale * (self.b @ self.a - self.b0 @ self.a0)


def convolved(matrix: Tensor, x: Tensor, layer: Any) -> Tensor:
    """A convolution layer's output without bias when its weight, as `out x in`, is this matrix."""
    return layer._conv_forward(x, matrix.to(x.dtype).unflatten(1, layer.weight.shape[1:]), None)


def branch_gradients(
    ctx: Any, g: Tensor, x: Tensor | None, survive: Tensor | None, z: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the branch, each only if needed: (g B, dA, dB)."""
    need_x, need_a, need_b = ctx.needed
    g = g.to(ctx.thin)
    gb = g @ b.to(g.dtype) if need_x or need_a else None
    da = db = None
    if need_a and gb is not None and x is not None:
        da = narrow_gradient(gb, branch_input(x, survive), ctx.scale, a.dtype)
    if need_b and z is not None:
        db = narrow_gradient(z, g, ctx.scale, b.dtype).T
    return gb, da, db


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x W^T + bias`, and a view of it as rows.

    It is no view itself: models add residuals to a layer's output in place, which autograd forbids on a view that a
    custom function returns.
    """
    if bias is None:
        y = nn.functional.linear(x, weight)
        return y, y.view(-1, weight.shape[0])
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, flat = y.view(-1, weight.shape[0]), x.reshape(-1, x.shape[-1])
    torch.addmm(bias, flat, weight.T, out=rows)
    return y, rows


def shifted(weight: Tensor, shift: Tensor | None) -> Tensor:
    """`weight + shift`, added in the higher precision and given in the weight's."""
    return weight if shift is None else (shift + weight).to(weight.dtype)


class _LowRankLinear(torch.autograd.Function):
    """`y = x (W + shift)^T + bias + scale ((kept x) A^T) B^T` with W, shift and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        survive: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        ctx.thin = dtype = thin_dtype(x, a, b)
        z = branch_input(x, survive).to(dtype) @ a.to(dtype).T
        y, rows = base_product(x, shifted(weight, shift), bias)
        add_up(rows, z, b.T, scale)
        ctx.scale, ctx.needed = scale, (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
        need_x, need_a, need_b = ctx.needed
        survive = survive if need_a or need_x else None
        save(ctx, x if need_a else None, survive, z if need_b else None, weight, shift, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, z, weight, shift, a, b = saved(ctx)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        gb, da, db = branch_gradients(ctx, g, x, survive, z, a, b)
        dx = None
        if ctx.needed[0] and gb is not None:
            dx = add_back(g @ shifted(weight, shift), gb, a, ctx.scale, survive)
            dx = dx.view(*gradients[0].shape[:-1], weight.shape[-1])
        return dx, None, None, da, db, None, None, None


def add_back(dx: Tensor, gz: Tensor, a: Tensor, scale: float, survive: Tensor | None) -> Tensor:
    """The gradient of an input (`tokens x in`) with the branch's share `scale gz A` added, in place; only what survived
    dropout has one."""
    if survive is None:
        add_up(dx, gz, a, scale)
        return dx
    return dx.addcmul_((gz @ a.to(gz.dtype)).to(dx.dtype), survive.view_as(dx).to(dx.dtype), value=scale)


class _Lowered(torch.autograd.Function):
    """x and `x A_i^T`; what comes back for the products is still to be multiplied by the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *factors: Tensor) -> tuple[Tensor, ...]:
        a = torch.cat([factor.to(x.dtype) for factor in factors])
        z = x.reshape(-1, x.shape[-1]) @ a.T
        ctx.scale, ctx.shape = scale, x.shape[:-1]
        ctx.set_materialize_grads(False)
        save(ctx, x if any(ctx.needs_input_grad[2:]) else None, *factors)
        return x, *z.split([len(factor) for factor in factors], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        x, *factors = saved(ctx)
        dx, *parts = gradients
        known = next((part for part in parts if part is not None), None)
        if known is None:
            return dx, *[None] * (1 + len(factors))
        sizes = [len(factor) for factor in factors]
        gz = torch.cat(
            [known.new_zeros(len(known), n) if p is None else p for p, n in zip(parts, sizes, strict=True)], dim=1
        )
        das = [None] * len(factors)
        if x is not None:
            das = narrow_gradient(gz, x.reshape(-1, x.shape[-1]), ctx.scale, factors[0].dtype).split(sizes)
        if ctx.needs_input_grad[0]:
            a = torch.cat([factor.to(gz.dtype) for factor in factors])
            if dx is None:
                dx = (gz @ a).mul_(ctx.scale).view(*ctx.shape, a.shape[1])
            else:
                dx = torch.addmm(dx.reshape(-1, a.shape[1]), gz, a, alpha=ctx.scale).view(dx.shape)
        return dx, None, *(d if need else None for d, need in zip(das, ctx.needs_input_grad[2:], strict=True))


class _Lifted(torch.autograd.Function):
    """`y = x W^T + bias + scale z B^T` with W and bias frozen; z gets its gradient without the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, scale: float) -> Tensor:
        y, rows = base_product(x, weight, bias)
        rows.addmm_(z, b.to(x.dtype).T, alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(z if ctx.needs_input_grad[4] else None, weight, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, weight, b = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        dx = (g @ weight).view(*gradients[0].shape[:-1], weight.shape[-1]) if ctx.needs_input_grad[0] else None
        gz = g @ b.to(g.dtype) if ctx.needs_input_grad[1] else None
        return dx, gz, None, None, None if z is None else narrow_gradient(z, g, ctx.scale, b.dtype).T, None


def narrow_gradient(narrow: Tensor, wide: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`scale narrow^T wide`, `rank x width`: this way round the wide operand is read in order."""
    product = (narrow.T @ wide.to(narrow.dtype)).to(dtype)
    return product if scale == 1.0 else product.mul_(scale)


class _LowRankAdd(torch.autograd.Function):
    """`y += scale ((kept x) A^T) B^T`, in place.

    `y` comes first: where it is a view, autograd takes the first gradient for that of the tensor written to.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, survive: Tensor | None) -> Tensor:
        ctx.thin = dtype = thin_dtype(x, a, b)
        z = branch_input(x, survive).to(dtype) @ a.to(dtype).T
        add_up(y.view(-1, y.shape[-1]), z, b.T, scale)
        ctx.mark_dirty(y)
        ctx.scale, ctx.needed = scale, ctx.needs_input_grad[1:4]
        need_x, need_a, need_b = ctx.needed
        save(ctx, x if need_a else None, survive if need_a or need_x else None, z if need_b else None, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, z, a, b = saved(ctx)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        gb, da, db = branch_gradients(ctx, g, x, survive, z, a, b)
        dx = None
        if ctx.needed[0] and gb is not None:
            dx = (gb @ a.to(gb.dtype)).mul_(ctx.scale).to(g.dtype).view(*gradients[0].shape[:-1], a.shape[-1])
            dx = dx if survive is None else dx.mul_(survive)
        return gradients[0], dx, da, db, None, None
