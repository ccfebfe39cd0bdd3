"""Low rank whose branch reads tokens re-weighted by side information: `y = W x + scale * B A ((1 + gamma) * x)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...model.weights import Weight
from ..part import Shared, Wrapper
from .low_rank import LowRank, dropped

VARIANTS = ("p_w", "p_wo", "b_w", "b_wo")
"""How gamma is made of a parse: of probabilities or of p >= 0.5, one for every relation or one for all."""


class Importance(Shared):
    """The weights of the tokens in hand, borrowed by all layers of one adapter.

    Attributes:
        gamma: `batch x tokens`, or `batch x tokens x groups` for one weight a group of input features; None for none.
        held: whether it holds for a while, whatever batches bring; else the last batch brought it, or brought none.
        weighed: whether any input was weighed yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma: Tensor | None = None
        self.held = self.weighed = False

    def of(self, x: Tensor) -> Tensor | None:
        """`1 + gamma` for an input, `batch x tokens x groups` in its dtype; None where there is no gamma.

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
        self.weighed = True
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
        return super().side(x) if weights is None else self._weighed(x, weights)

    def _weighed(self, x: Tensor, weights: Tensor) -> Tensor:
        x = dropped(self, x)
        # Only activations as narrow as the rank are weighed: group by group, then summed.
        size = -(-x.shape[-1] // weights.shape[-1])
        columns = zip(x.split(size, dim=-1), self.a.to(x.dtype).split(size, dim=-1), weights.unbind(-1), strict=False)
        z = torch.stack([(part @ a.T) * weight.unsqueeze(-1) for part, a, weight in columns]).sum(0)
        return self.scale * (z @ self.b.to(x.dtype).T)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        weights = self._weights(x)
        return super().act(x, y, weight) if weights is None else y + self._weighed(x, weights).to(y.dtype)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        weighed = self.reads and self.importance.gamma is not None
        return None if weighed else super().with_base(x, weight, bias)


class Bearer(Wrapper):
    """Takes what a batch says of its tokens out of the model's call: `importance`, or `parse` and `units`.

    It stays until the next call, for blocks that are computed again in the backward pass.

    Args:
        importance: where gamma is put.
        variant: how it is made of a parse, see `importance_of`.
    """

    settings: ClassVar[tuple[str, ...]] = ("variant",)
    borrowed: ClassVar[tuple[str, ...]] = ("importance",)
    routable = True

    def __init__(self, importance: Importance, variant: str) -> None:
        super().__init__()
        self.importance, self.variant = importance, variant

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in ("importance", "parse", "units") if name in kwargs}
        gamma = gamma_of(given.get("importance"), given.get("parse"), given.get("units"), self.variant)
        if not self.importance.held:
            self.importance.gamma = gamma
        further = getattr(getattr(call, "func", None), "__self__", None)
        if isinstance(further, Bearer):  # another adapter's, which reads the same
            kwargs |= given
        return call(*args, **kwargs)


def gamma_of(gamma: Tensor | None, parse: Tensor | None, units: Tensor | None, variant: str) -> Tensor | None:
    """The importance of a batch's tokens: as given, or made of a parse.

    Args:
        gamma: `batch x tokens` or `batch x tokens x groups`, at least 0; None for none.
        parse: `batch x units x units x relations`, see `importance_of`; documents with fewer units are padded with -1.
        units: `batch x tokens`, see `spread`.
        variant: how gamma is made of a parse.

    Raises:
        ValueError: when gamma is negative or of other dimensions, or of parse and units one is missing.
    """
    if (parse is None) != (units is None) or (parse is not None and gamma is not None):
        raise ValueError("importance is given as gamma, or as parse and units, the unit of every token")
    if parse is not None and units is not None:
        counts = [int((p >= 0).flatten(1).any(1).sum()) for p in parse]
        documents = zip(parse, units, counts, strict=True)
        gamma = torch.stack([spread(importance_of(p[:n, :n], variant), u) for p, u, n in documents])
    if gamma is not None and (gamma.dim() not in (2, 3) or bool((gamma < 0).any())):
        raise ValueError("importance is batch x tokens, or batch x tokens x groups, and never negative")
    return gamma


def importance_of(p: Tensor, variant: str) -> Tensor:
    """gamma of every unit of a document from its parse.

    Args:
        p: `units x units x relations`, probability that the first is the nucleus of the second.
        variant: of `VARIANTS`.

    Returns:
        `units x relations` for variants with relations, `units` without.
    """
    if variant not in VARIANTS or p.dim() != 3 or p.shape[0] != p.shape[1]:
        raise ValueError(f"a parse is units x units x relations and a variant one of {', '.join(VARIANTS)}")
    kind, relations = variant.split("_")
    values = (p >= 0.5).to(p.dtype) if kind == "b" else p
    values = values * (1 - torch.eye(len(p), dtype=p.dtype, device=p.device)).unsqueeze(-1)
    mean = values.mean(1)
    return mean if relations == "w" else mean.mean(-1)


def spread(values: Tensor, units: Tensor) -> Tensor:
    """Every token's gamma: that of its unit.

    Args:
        values: `units` or `units x relations`.
        units: `tokens`, index of each token's unit; -1 for a token without one, which gets 0.
    """
    found = values[units.clamp(min=0)]
    return torch.where((units < 0).view(-1, *[1] * (found.dim() - 1)), 0, found)


def aligned(offsets: Tensor, spans: Tensor) -> Tensor:
    """The unit of every token, `tokens`, -1 for none, as `spread` takes it.

    Args:
        offsets: `tokens x 2`, the characters of each token, as fast tokenizers give them (`return_offsets_mapping`);
            special tokens, which have no characters, belong to no unit.
        spans: `units x 2`, first character of each unit and the one behind its last.
    """
    middle = offsets.sum(-1, keepdim=True) / 2  # a token may begin with the space before its unit
    inside = (spans[:, 0] <= middle) & (middle < spans[:, 1]) & (offsets[:, :1] < offsets[:, 1:])
    return torch.where(inside.any(-1), inside.int().argmax(-1), -1)


def overlap(ids: Tensor, units: Tensor) -> Tensor:
    """A parse where there is no parser, `units x units x 1`: what share of the second unit's tokens the first has too.

    Args:
        ids: `tokens`.
        units: `tokens`, the unit of each; -1 for none.
    """
    count, words = int(units.max()) + 1, ids.unique(return_inverse=True)[1]
    has = torch.zeros(count, int(words.max()) + 1, device=ids.device)
    has[units[units >= 0], words[units >= 0]] = 1
    shared = (has @ has.T) / has.sum(1).clamp(min=1)
    return shared.fill_diagonal_(0).unsqueeze(-1)
