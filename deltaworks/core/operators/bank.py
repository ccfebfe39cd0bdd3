"""Low-rank factors put together from one bank of vectors that all layers share.

Every factor is cut into pieces of the bank's vector length; each piece is a mixture of the k bank vectors with the
largest logits, weighted by the softmax over these k. `BankFactors` holds the logits; `ChosenFactors` holds what is left
of them after training: the indices, and all weights but the last, which the others determine.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..init import uniform
from ..part import Shared
from .low_rank import Factored


class VectorBank(Shared):
    """The trained bank, `count x length`, drawn from U(-0.02, 0.02)."""

    settings: ClassVar[tuple[str, ...]] = ("count", "length")

    def __init__(self, count: int, length: int) -> None:
        super().__init__()
        self.count, self.length = count, length
        self.vectors = nn.Parameter(uniform(count, length, bound=0.02))


class Mixed(Factored):
    """A LoRA whose factors are mixtures of bank vectors; a subclass says which, and with what weights."""

    borrowed: ClassVar[tuple[str, ...]] = ("bank",)
    scale = 1.0
    bank: VectorBank
    length: int

    def mixture(self, factor: str) -> tuple[Tensor, Tensor]:
        """Indices into the bank and weights, both `... x k`, of a factor's pieces: `rank x in/length` for "a",
        `out/length x rank` for "b".
        """
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = (self._pieces(*self.mixture(factor)) for factor in "ab")
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def _pieces(self, index: Tensor, weights: Tensor) -> Tensor:
        vectors = self.bank.vectors[:, : self.length]
        return (weights.unsqueeze(-1) * vectors[index].to(weights.dtype)).sum(-2)


class BankFactors(Mixed):
    """Factors mixed by trained logits.

    Args:
        a: logits, `rank x in/length x count`.
        b: logits, `out/length x rank x count`.
        bank: the shared vectors.
        length: values of a piece; at most the bank's.
        top: k, how many vectors a piece is mixed from.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("length", "top", "dropout")

    def __init__(self, a: Tensor, b: Tensor, bank: VectorBank, length: int, top: int, dropout: float = 0.0) -> None:
        super().__init__()
        if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[1] or not a.shape[2] == b.shape[2] == bank.count:
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise ValueError(
                f"logits {shapes} do not fit a bank of {bank.count}; A is r x pieces x h, B pieces x r x h"
            )
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.bank, self.length, self.top, self.dropout = bank, length, top, float(dropout)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def mixture(self, factor: str) -> tuple[Tensor, Tensor]:
        values, index = getattr(self, factor).topk(self.top, dim=-1)
        return index, values.softmax(-1)

    def chosen(self) -> ChosenFactors:
        """The same change by indices and weights alone."""
        stored = {}
        with torch.no_grad():
            for factor in "ab":
                index, weights = self.mixture(factor)
                wide = torch.int16 if self.bank.count <= 2**15 else torch.int32
                kind = torch.uint8 if self.bank.count <= 2**8 else wide
                stored |= {f"{factor}_index": index.to(kind), f"{factor}_weights": weights[..., :-1].clone()}
        return ChosenFactors(**stored, bank=self.bank, length=self.length)


class ChosenFactors(Mixed):
    """Factors mixed by stored weights; nothing here trains.

    Args:
        a_index, b_index: indices into the bank, `rank x in/length x k` and `out/length x rank x k`.
        a_weights, b_weights: the weights of all but the last of them.
        bank: the shared vectors.
        length: values of a piece; at most the bank's.
    """

    settings: ClassVar[tuple[str, ...]] = ("length",)
    a_index: Tensor
    b_index: Tensor

    def __init__(
        self, a_index: Tensor, b_index: Tensor, a_weights: Tensor, b_weights: Tensor, bank: VectorBank, length: int
    ) -> None:
        super().__init__()
        for name, index, weights in (("a", a_index, a_weights), ("b", b_index, b_weights)):
            if not index.is_meta and not 0 <= int(index.min()) <= int(index.max()) < bank.count:
                raise ValueError(f"indices of {name} point outside a bank of {bank.count} vectors")
            self.register_buffer(f"{name}_index", index)
            self.register_buffer(f"{name}_weights", weights)
        self.bank, self.length = bank, length
        bank.vectors.requires_grad_(False)

    @property
    def rank(self) -> int:
        return self.a_index.shape[0]

    def mixture(self, factor: str) -> tuple[Tensor, Tensor]:
        weights = getattr(self, f"{factor}_weights")
        return getattr(self, f"{factor}_index").long(), torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
