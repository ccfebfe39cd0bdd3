"""Low rank whose branch reads tokens re-weighted by side information: `y = W x + scale * B A ((1 + gamma) * x)`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...model.weights import Weight
from ..part import Shared
from .low_rank import LowRank, dropped


class Importance(Shared):
    """The weights of the tokens in hand, borrowed by all layers of one adapter.

    Attributes:
        gamma: `batch x tokens`, or `batch x tokens x groups` for one weight a group of input features; None for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma: Tensor | None = None

    def of(self, x: Tensor) -> Tensor | None:
        """`1 + gamma` for an input, `batch x tokens x groups` in its dtype; None where gamma is zero throughout.

        A single token behind a prompt, as cached generation reads it, and tokens beyond gamma's have none.
        """
        gamma = self.gamma
        if gamma is None or (x.dim() == 3 and x.shape[1] == 1 < gamma.shape[1]):
            return None
        if x.dim() != 3 or x.shape[0] % gamma.shape[0] or x.shape[1] < gamma.shape[1]:
            raise ValueError(
                f"importance of {list(gamma.shape)} does not fit an input of {list(x.shape)}; "
                "it is batch x tokens, or batch x tokens x groups"
            )
        groups = gamma.unsqueeze(-1) if gamma.dim() == 2 else gamma
        groups = groups.repeat_interleave(x.shape[0] // gamma.shape[0], dim=0)  # beams
        beyond = groups.new_zeros(len(x), x.shape[1] - groups.shape[1], groups.shape[2])
        return 1 + torch.cat([groups, beyond], dim=1).to(x)


class Weighted(LowRank):
    """A LoRA that reads `(1 + gamma) * x`; without gamma it is a LoRA in every bit.

    Args:
        a, b, scale, dropout: as of `LowRank`.
        importance: where gamma is found.
        reads: whether this layer's input is the sequence gamma is about; a decoder behind an encoder has none.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout", "reads")
    borrowed: ClassVar[tuple[str, ...]] = ("importance",)

    def __init__(
        self, a: Tensor, b: Tensor, importance: Importance, scale: float, dropout: float = 0.0, reads: bool = True
    ) -> None:
        super().__init__(a, b, scale=scale, dropout=dropout)
        self.importance, self.reads = importance, reads

    def _weights(self, x: Tensor) -> Tensor | None:
        return self.importance.of(x) if self.reads else None

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return (self.reads and self.importance.gamma is not None) or super().prefers_side(tokens, weight)

    def side(self, x: Tensor) -> Tensor:
        weights = self._weights(x)
        if weights is None:
            return super().side(x)
        x = dropped(self, x)
        # Only activations as narrow as the rank are weighed: group by group, then summed.
        size = -(-x.shape[-1] // weights.shape[-1])
        columns = zip(x.split(size, dim=-1), self.a.to(x.dtype).split(size, dim=-1), weights.unbind(-1), strict=False)
        z = torch.stack([(part @ a.T) * weight.unsqueeze(-1) for part, a, weight in columns]).sum(0)
        return self.scale * (z @ self.b.to(x.dtype).T)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return super().act(x, y, weight) if self._weights(x) is None else y + self.side(x).to(y.dtype)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return super().with_base(x, weight, bias) if self._weights(x) is None else None
