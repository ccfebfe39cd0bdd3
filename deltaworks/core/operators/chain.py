"""Low rank that goes on from finished factors: dropout is for what trains."""

from __future__ import annotations

from torch import Tensor, nn

from ...model.weights import Weight
from .low_rank import LowRank, add_branch, convolved, dropped, linear_with_branch, plain


class Chain(LowRank):
    """`dW = scale * (B A - B0 A0)`, of which `-B0 A0` counts as part of the weight: no dropout comes before it.

    Args: those of `LowRank`, a0 and b0 always among them.
    """

    @property
    def drops(self) -> bool:
        """Whether the two products read different inputs at present."""
        return bool(self.dropout and self.training)

    def shareable(self, x: Tensor) -> bool:
        return not self.drops and plain(self, x)

    def side(self, x: Tensor) -> Tensor:
        return add_branch(self, x, self._finished(x), self.a, self.b) if self.drops else super().side(x)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        if not self.drops:
            return super().act(x, y, weight)
        return add_branch(self, x, y + self._finished(x).to(y.dtype), self.a, self.b)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not self.drops:
            return super().with_base(x, weight, bias)
        y = linear_with_branch(self, x, weight, bias, self.a, self.b)
        return None if y is None else y + self._finished(x)

    def convolve(self, x: Tensor, layer: nn.Module) -> Tensor:
        if not self.drops:
            return super().convolve(x, layer)
        a0, b0 = self._constants()
        trained, finished = self.scale * (self.b @ self.a), self.scale * (b0 @ a0)
        return convolved(trained, dropped(self, x), layer) - convolved(finished, x, layer)

    def _finished(self, x: Tensor) -> Tensor:
        a0, b0 = self._constants()
        return (x @ a0.to(x.dtype).T) @ b0.to(x.dtype).T * -self.scale

    def _constants(self) -> tuple[Tensor, Tensor]:
        assert self.a0 is not None and self.b0 is not None
        return self.a0, self.b0
