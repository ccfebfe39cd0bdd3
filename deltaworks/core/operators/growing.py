"""Triplets that grow: `dW = alpha / n sum_i l_i p_i q_i^T` over `n` active terms and some in reserve."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..part import heard
from .low_rank import Factored, convolved
from .products import over_rows
from .saving import save, saved
from .triplet import Triplet

CHUNK = 1 << 20
"""Entries that are heard at a time: they stay in a processor's cache."""


class Growing(Factored):
    """`dW = alpha / (n + 1e-5) * P diag(l, reserve) Q`, with `n` the number of active terms; it can be watched.

    Args:
        p: `out x (n + m)`.
        l: `n`, the weights of the active terms.
        q: `(n + m) x in`.
        reserve: `m`, the constant weights of the terms in reserve, the last of P and Q.
        alpha: numerator of the scale.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("alpha", "dropout")
    scale = 1.0
    reserve: Tensor

    def __init__(self, p: Tensor, l: Tensor, q: Tensor, reserve: Tensor, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if p.dim() != 2 or q.dim() != 2 or not p.shape[1] == len(l) + len(reserve) == q.shape[0]:
            shapes = f"P {list(p.shape)}, l {list(l.shape)}, reserve {list(reserve.shape)} and Q {list(q.shape)}"
            raise ValueError(f"{shapes} do not fit; P is out x (n + m), l has n values, reserve m, Q is (n + m) x in")
        self.p, self.l, self.q = nn.Parameter(p), nn.Parameter(l), nn.Parameter(q)
        self.register_buffer("reserve", reserve)
        self.alpha, self.dropout = float(alpha), float(dropout)

    @property
    def rank(self) -> int:
        return self.q.shape[-2]

    def factors(self) -> tuple[Tensor, Tensor]:
        weights = torch.cat([self.l, self.reserve]) * (self.alpha / (self.l.shape[0] + 1e-5))
        return self.q, self.p * weights

    def dense(self) -> Tensor:
        return heard(self.watch, super().dense())

    def side(self, x: Tensor) -> Tensor:
        return self._observed(super().side(x), x)

    def act(self, x: Tensor, y: Tensor, weight: Any) -> Tensor:
        return self._observed(super().act(x, y, weight), x)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        y = super().with_base(x, weight, bias)
        return None if y is None else self._observed(y, x)

    def look_up(self, tokens: Tensor, layer: nn.Embedding) -> Tensor:
        if self.watch is None:
            return super().look_up(tokens, layer)
        return nn.functional.embedding(tokens, self.dense().T, layer.padding_idx)

    def convolve(self, x: Tensor, layer: nn.Module) -> Tensor:
        return super().convolve(x, layer) if self.watch is None else convolved(self.dense(), x, layer)

    def final(self) -> Triplet:
        """The same change of the active terms alone, which grows no more."""
        active = self.l.shape[0]
        p, l, q = self.p.data[:, :active].clone(), self.l.data.clone(), self.q.data[:active].clone()
        return Triplet(p, l, q, self.alpha / (active + 1e-5), self.dropout)

    def _observed(self, y: Tensor, x: Tensor) -> Tensor:
        if self.watch is None or not y.requires_grad or torch.compiler.is_compiling():
            return y
        return _Observed.apply(y, x, self)  # type: ignore[return-value]


class _Observed(torch.autograd.Function):
    """`y` as it is; in backward the delta's watch hears the change and `g^T x`, both built for that moment only, some
    rows at a time."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, delta: Growing) -> Tensor:
        ctx.delta = delta
        ctx.mark_dirty(y)
        save(ctx, x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = saved(ctx)
        if ctx.delta.watch is not None:
            g = gradients[0].reshape(-1, gradients[0].shape[-1])
            x = x.reshape(-1, x.shape[-1]).to(g.dtype)  # under autocast a layer reads more precisely than it computes
            q, p = (factor.detach().to(g.dtype) for factor in ctx.delta.factors())
            step = max(1, CHUNK // x.shape[1])
            for low in range(0, len(p), step):
                ctx.delta.watch(p[low : low + step] @ q, over_rows(g[:, low : low + step], x), len(p) * x.shape[1])
        return gradients[0], None, None
