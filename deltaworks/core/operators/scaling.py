"""A diagonal change: every output feature, or every input feature, multiplied by a number of its own.

`diag(l) W` scales what the layer gives, its bias included; `W diag(l)` scales what it reads and leaves the bias.
Neither matrix is built: one product with a vector does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta


class Scaling(Delta):
    """`W' = diag(l) W, b' = l b` or, at the input, `W' = W diag(l), b' = b`.

    Args:
        l: one factor a feature: `out`, or `in` at the input.
        at_input: which of the two.
    """

    settings: ClassVar[tuple[str, ...]] = ("at_input",)
    additive = False
    lean = True

    def __init__(self, l: Tensor, at_input: bool = False) -> None:
        super().__init__()
        if l.dim() != 1:
            raise ValueError(f"a scaling has one factor a feature; its factors have shape {list(l.shape)}")
        self.l = nn.Parameter(l)
        self.at_input = at_input

    def fold(self, weight: Tensor) -> Tensor:
        factors = self.l if self.at_input else self.l.unsqueeze(-1)
        return (weight * factors).to(weight.dtype)

    def fold_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.at_input else (bias * self.l).to(bias.dtype)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # A scaled input of some rows of a fused weight would have to leave the other rows' input alone.
        return not (self.at_input and self.site.rows is not None)

    def gains(self) -> Tensor | None:
        return None if self.at_input else self.l

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        return call(x * self.l.to(x.dtype)) if self.at_input else None

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return y * self.l.to(y.dtype)
