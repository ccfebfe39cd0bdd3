"""Keys and values in front of an attention's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import Attended, Attending, AttentionCall, Compute
from ..init import normal
from ..part import Shared, Wrapper


class PrefixKV(Attending):
    """A table of keys and values that every query sees.

    Args:
        key, value: `key heads x length x head size`, trained; keys carry no position (they are not rotated).
        dropout: probability of dropping an entry of the table while training.
    """

    settings = ("dropout",)

    def __init__(self, key: Tensor, value: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.key, self.value, self.dropout = nn.Parameter(key), nn.Parameter(value), dropout

    def attend(self, call: AttentionCall, compute: Compute) -> Attended:
        key, value = (F.dropout(table, self.dropout, self.training) for table in (self.key, self.value))
        return compute(call.preceded_by(key, value))


class PrefixEncoder(Shared):
    """What makes the prefixes of all layers while they train: position embeddings and the first half of an MLP.

    Args:
        number: of kinds of attention (encoder, decoder, cross), each with embeddings and weights of its own.
        length: number of positions m.
        width: size of an embedding.
        hidden: inner width b of the MLP.
    """

    settings = ("number", "length", "width", "hidden")

    def __init__(self, number: int, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.number, self.length, self.width, self.hidden = number, length, width, hidden
        self.embedding = nn.Parameter(normal(number, length, width))
        self.down = nn.ModuleList(nn.Linear(width, hidden) for _ in range(number))

    def forward(self, kind: int) -> Tensor:
        """The inner activations of one kind, `length x hidden`."""
        return torch.tanh(self.down[kind](self.embedding[kind]))


class EncodedPrefix(Attending):
    """One layer's prefix in the form that trains: the second half of the MLP, on top of what all layers share.

    Args:
        kind: which of the encoder's kinds of attention.
        heads: number of key heads.
        size: size of a head.
        hidden: inner width of the MLP.
        dropout: probability of dropping an entry of the table while training.
        encoder: the first half, shared by all layers.
    """

    settings = ("kind", "heads", "size", "hidden", "dropout")
    borrowed = ("encoder",)

    def __init__(self, kind: int, heads: int, size: int, hidden: int, dropout: float, encoder: PrefixEncoder) -> None:
        super().__init__()
        self.kind, self.heads, self.size, self.hidden, self.dropout = kind, heads, size, hidden, dropout
        self.up = nn.Linear(hidden, 2 * heads * size)
        self.encoder = encoder

    def table(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each `heads x length x size`."""
        both = self.up(self.encoder(self.kind)).view(-1, 2, self.heads, self.size)
        key, value = both.permute(1, 2, 0, 3)
        return key, value

    def attend(self, call: AttentionCall, compute: Compute) -> Attended:
        key, value = (F.dropout(table, self.dropout, self.training) for table in self.table())
        return compute(call.preceded_by(key, value))

    def tabulated(self) -> PrefixKV:
        """The same prefix as a table."""
        with torch.no_grad():
            key, value = self.table()
        return PrefixKV(key.contiguous(), value.contiguous(), self.dropout)


class ShiftedPositions(Wrapper):
    """Lets text begin at position `by` where a model looks up or rotates by positions.

    Args:
        by: number of positions.
    """

    settings = ("by",)

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.apply_defaults()
        for name in ("position_ids", "past_key_values_length", "input"):
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = bound.arguments[name] + self.by
                return call(*bound.args, **bound.kwargs)
        raise ValueError("a module was called without positions, which can then not be shifted")
