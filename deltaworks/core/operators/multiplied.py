"""A change that multiplies the weight's entries, so that its zeros stay zeros."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from .effective import Built
from .low_rank import dropped
from .recompute import recomputed


class Multiplied(Built):
    """`W'[i, j] = W[i, j] (1 + scale * a[g(i), j] * b[i])`, `g(i) = floor(i r / out)`.

    The weight is built, in two passes over it. Under dropout activations pass group by group instead,
    `((x * a_g) W_g^T) * b_g`.

    Args:
        a: factors of the inputs, `r x in`, one row for each group of outputs.
        b: factors of the outputs, `out`.
        scale: multiplies the change.
        dropout: probability of zeroing an input feature of the added path in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    additive = False
    lean = True

    def __init__(self, a: Tensor, b: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 1 or len(a) > len(b):
            raise ValueError(f"factors {list(a.shape)} and {list(b.shape)} do not fit; r x in and out, r at most out")
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = float(scale), float(dropout)

    def groups(self) -> Tensor:
        """The group of every output."""
        fan_out, r = self.b.shape[-1], self.a.shape[-2]
        return torch.arange(fan_out, device=self.b.device) * r // fan_out

    def fold(self, weight: Tensor) -> Tensor:
        factors = 1 + self.scale * self.a[self.groups()] * self.b.unsqueeze(-1)
        return (weight.to(factors.dtype) * factors).to(weight.dtype)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # The base's product comes on top, and one more pass over the activations for every group.
        return bool(self.dropout and self.training)

    def built(self, weight: Tensor) -> Tensor:
        return torch.addcmul(weight, weight, self._factors(weight.dtype), value=self.scale)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        change.mul_(weight)
        a, b = self.a.detach().to(change.dtype), self.b.detach().to(change.dtype)
        r, fan_out = len(a), len(b)
        if fan_out % r:
            ends = [-(-g * fan_out // r) for g in range(r + 1)]
            parts = [slice(*pair) for pair in itertools.pairwise(ends)]
            da = torch.stack([b[part] @ change[part] for part in parts])
            db = torch.cat([change[part] @ a[g] for g, part in enumerate(parts)])
        else:
            grouped = change.view(r, -1, change.shape[-1])
            da = torch.bmm(b.view(r, 1, -1), grouped).squeeze(1)
            db = torch.bmm(grouped, a.unsqueeze(2)).flatten()
        return da.to(self.a.dtype).mul_(self.scale), db.to(self.b.dtype).mul_(self.scale)

    def _factors(self, dtype: torch.dtype) -> Tensor:
        """What every entry is multiplied by, without the scale, `out x in`."""
        a, b = self.a.detach().to(dtype), self.b.detach().to(dtype).unsqueeze(-1)
        if len(b) % len(a):
            return a[self.groups()] * b
        return (a.unsqueeze(1) * b.view(len(a), -1, 1)).flatten(0, 1)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        def added(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            matrix, r, fan_out = weight.matrix().to(x.dtype), len(a), len(b)
            ends = [-(-g * fan_out // r) for g in range(r + 1)]
            parts = [(x * a[g].to(x.dtype)) @ matrix[ends[g] : ends[g + 1]].T for g in range(r)]
            return torch.cat(parts, dim=-1) * (self.scale * b).to(x.dtype)

        return y + recomputed(added, dropped(self, x), self.a, self.b).to(y.dtype)
