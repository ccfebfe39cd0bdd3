"""Dropout of a change itself: of some of its rows, that is outputs, or of all of it at once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...model.weights import Weight, consumes
from ..part import Delta


class RowDropout(Delta):
    """Stands before another delta among the bases of a class; acts where activations pass beside the weight.

    Attributes:
        row_dropout: probability of dropping each row of the change in training.
        module_dropout: probability of dropping the whole change in training, drawn in every call.
        rescale: whether the rows that stay are divided by their share.
    """

    row_dropout: float = 0.0
    module_dropout: float = 0.0
    rescale: bool = True

    def dropping(self) -> bool:
        """Whether anything may be dropped now."""
        return self.training and bool(self.row_dropout or self.module_dropout)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return self.dropping() or super().prefers_side(tokens, weight)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return None if self.dropping() else super().with_base(x, weight, bias)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return y + self.side(x).to(y.dtype) if self.dropping() else super().act(x, y, weight)

    def side(self, x: Tensor) -> Tensor:
        return self.thinned(super().side(x))

    def thinned(self, change: Tensor) -> Tensor:
        """What is left of a change of activations, `... x out`."""
        if not self.dropping():
            return change
        kept = torch.rand(change.shape[-1], device=change.device) >= self.row_dropout
        factor = kept.to(change.dtype)
        if self.rescale:
            factor = factor / factor.mean().clamp(min=1 / len(factor))
        whole = torch.rand((), device=change.device) >= self.module_dropout
        return change * (factor * whole)


def tell(slug: str, weight: Weight) -> None:
    """Warn where nothing passes beside the weight, so that dropping rows of its change cannot act."""
    if weight.experts is not None or consumes(weight.layer) != "linear":
        warnings.warn(
            f"{slug}: row_dropout and module_dropout do not act at {weight.path or 'a weight'}, where the weight is "
            "changed as a whole",
            stacklevel=2,
        )
