"""The weight's spectrum shifted and its input rotated by a Kronecker product: `W' = U relu(S + shift) V^T O^T`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
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
        turns = [q.to(x.dtype).mT if back else q.to(x.dtype) for q in (self.q1, self.q2, self.q3)]
        blocks = x.unflatten(-1, [q.shape[-1] for q in turns])
        return torch.einsum("...abc,ad,be,cf->...def", blocks, *turns).flatten(-3)

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
