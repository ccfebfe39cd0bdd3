"""Scaled constant factors: `dW = scale * diag(l) B diag(d) A`, where only the vectors train.

`A` is `rank x in`, `B` is `out x rank`, both constant: random and shared by all layers (VeRA), waves (FourierFT), or
taken from the weight. The product keeps `x A^T` for backward, `tokens x rank`, and nothing as wide as the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta, Shared
from .low_rank import add_back, base_product, branch_input, dropped, kept, plain
from .made import constant

Bases = Callable[[torch.dtype], tuple[Tensor, Tensor]]


class Scaled(Delta):
    """`dW = scale * diag(l) B diag(d) A` with constant A and B.

    A subclass sets `scale` and `dropout` and defines `bases` and `scales`.
    """

    lean = True
    scale: float
    dropout: float = 0.0

    def bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (`rank x in`) and B (`out x rank`), the constants, in a dtype; made anew or borrowed at every call."""
        raise NotImplementedError

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """d (`rank`) and l (`out`, or None for all one)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        d, l = self.scales()
        a, b = self.bases(d.dtype)
        change = (b * d) @ a
        return self.scale * (change if l is None else l.unsqueeze(-1) * change)

    def side(self, x: Tensor) -> Tensor:
        return self._product(x, None, None)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return self._product(x, weight, bias) if plain(self, x) and weight.dtype == x.dtype else None

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        d, l = self.scales()
        if plain(self, x):
            survive, scale = kept(self, x)
            return _ScaledLinear.apply(x, weight, bias, d, l, self.bases, scale, survive)  # type: ignore[return-value]
        a, b = self.bases(x.dtype)
        u = ((dropped(self, x) @ a.T) * d.to(x.dtype)) @ b.T
        return self.scale * (u if l is None else u * l.to(x.dtype))


class RandomPair(Shared):
    """A frozen random pair that every layer of an adapter slices: Kaiming uniform (a = 0), drawn on the CPU.

    Made again from the seed, never stored. A comes before B out of one generator, as in `peft`, so the same seed and
    sizes are the same pair there.

    Args:
        rank: inner dimension.
        fan_in, fan_out: widths of the widest layer.
        seed: of the generator.
    """

    settings: ClassVar[tuple[str, ...]] = ("rank", "fan_in", "fan_out", "seed")
    a: Tensor
    b: Tensor

    def __init__(self, rank: int, fan_in: int, fan_out: int, seed: int) -> None:
        super().__init__()
        self.rank, self.fan_in, self.fan_out, self.seed = rank, fan_in, fan_out, seed
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, shape in (("a", (rank, fan_in)), ("b", (fan_out, rank))):
            bound = math.sqrt(6 / shape[1])
            drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=False)


class ScaledRandom(Scaled):
    """Trained vectors around a shared random pair, of which this layer takes the first rows and columns.

    Args:
        lambda_d: `rank`, scales the inner features.
        lambda_b: `out`, scales the outputs.
        pair: the shared A and B.
        fan_in: width of this layer's input.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_in", "dropout")
    borrowed: ClassVar[tuple[str, ...]] = ("pair",)
    scale = 1.0

    def __init__(self, lambda_d: Tensor, lambda_b: Tensor, pair: RandomPair, fan_in: int, dropout: float = 0.0) -> None:
        super().__init__()
        wanted = (lambda_d.shape[0], fan_in, lambda_b.shape[0])
        if any(want > have for want, have in zip(wanted, (pair.rank, pair.fan_in, pair.fan_out), strict=True)):
            have = (pair.rank, pair.fan_in, pair.fan_out)
            raise ValueError(f"a layer of (rank, in, out) = {wanted} does not fit the shared random pair of {have}")
        self.lambda_d, self.lambda_b = nn.Parameter(lambda_d), nn.Parameter(lambda_b)
        self.pair, self.fan_in, self.dropout = pair, fan_in, float(dropout)

    def bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rank, fan_out, fan_in = self.lambda_d.shape[-1], self.lambda_b.shape[-1], self.fan_in
        return (
            constant(self.pair.a, dtype, lambda a: a[:rank, :fan_in], (rank, fan_in)),
            constant(self.pair.b, dtype, lambda b: b[:fan_out, :rank], (fan_out, rank)),
        )

    def scales(self) -> tuple[Tensor, Tensor]:
        return self.lambda_d, self.lambda_b

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # The side path needs no input for backward, so building the weight pays only where nothing is kept.
        rank = self.lambda_d.shape[0]
        return torch.is_grad_enabled() or rank * (weight.fan_in + weight.fan_out) < weight.fan_in * weight.fan_out


class _ScaledLinear(torch.autograd.Function):
    """`x W^T + bias + scale ((kept x) A^T) (diag(l) B diag(d))^T`; d and l train. Without W the last term only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        d: Tensor,
        l: Tensor | None,
        bases: Bases,
        scale: float,
        survive: Tensor | None,
    ) -> Tensor:
        a, b = bases(x.dtype)
        z = branch_input(x, survive) @ a.T
        inner, out = z * d.to(z.dtype), b if l is None else b * l.to(b.dtype).unsqueeze(-1)
        if weight is None:
            y = x.new_empty(*x.shape[:-1], out.shape[0])
            torch.mm(inner, out.T, out=y.view(-1, out.shape[0])).mul_(scale)
        else:
            y, rows = base_product(x, weight, bias)
            rows.addmm_(inner, out.T, alpha=scale)
        ctx.bases, ctx.scale = bases, scale
        ctx.save_for_backward(z, weight, d, l, survive if ctx.needs_input_grad[0] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, weight, d, l, survive = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        a, b = ctx.bases(g.dtype)
        inner = d.to(g.dtype)
        gb = g @ (b if l is None else b * l.to(b.dtype).unsqueeze(-1))
        dd = (gb * z).sum(0).to(d.dtype).mul_(ctx.scale)
        dl = None
        if l is not None:
            # The columns of the branch's last product, before l, have these gradients; B is the same for all rows.
            dl = (g.T @ (z * inner)).mul_(b).sum(1).to(l.dtype).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            if weight is None:
                dx = (gb.mul_(inner) @ a).mul_(ctx.scale)
                dx = dx if survive is None else dx.mul_(survive.view_as(dx))
            else:
                dx = add_back(g @ weight, gb.mul_(inner), a, ctx.scale, survive)
            dx = dx.view(*gradients[0].shape[:-1], dx.shape[-1])
        return dx, None, None, dd, dl, None, None, None
