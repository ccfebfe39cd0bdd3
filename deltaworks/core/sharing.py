"""One product for the layers that read one tensor.

Query, key and value read the same activations, gate and up too. Whoever is called first with a tensor multiplies it
with the inner factors of all of them; the others find their share. A tensor so small that a product costs less than to
share it is left to each. Who reads with whom is known from the model's description, so that the same model always
shares the same products, to the last bit; that it is one and the same tensor is seen at every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .operators.low_rank import Factored, is_quick, lowered

if TYPE_CHECKING:
    from .graft import Graft


class Share(NamedTuple):
    """What a layer is lent: its input, the input's product with its inner factor, its outer factor."""

    part: Factored
    x: Tensor
    z: Tensor
    b: Tensor


class Sharing:
    """The products of the tensor that was read last, for one model; copies and pickles of it start empty."""

    def __init__(self) -> None:
        self.shares: dict[Graft, Share] = {}
        self.state: tuple[Any, ...] = ()  # of the tensor the shares were made of

    def __reduce__(self) -> Any:
        return Sharing, ()

    def share(self, graft: Graft, part: Factored, x: Tensor) -> Share | None:
        """The share of a layer that is called with `x`; None where nobody after it reads the same, or a product is less
        work than to share it."""
        if not part.shareable(x) or x.is_inference():
            return None
        if is_quick(part, x):
            self.shares = {}
            return None
        if self.shares:
            share = self.shares.pop(graft, None)
            if share is not None and share.part is part and self.state == _state(x):
                return share
            self.shares = {}
        readers = {graft: part}
        for follower in graft.followers:
            other = follower.sole()
            if isinstance(other, Factored) and other.shareable(x) and other.scale == part.scale:
                readers[follower] = other
        return self._spread(readers, x) if len(readers) > 1 else None

    def _spread(self, readers: dict[Graft, Factored], x: Tensor) -> Share:
        pairs = {reader: part.factors() for reader, part in readers.items()}
        inner = {id(a): a for a, _ in pairs.values()}  # a factor that several layers have is multiplied once
        again, *products = lowered(x, list(inner.values()), next(iter(readers.values())).scale)
        places = dict(zip(inner, products, strict=True))
        shares = {r: Share(readers[r], again, places[id(a)], b) for r, (a, b) in pairs.items()}
        mine = shares.pop(next(iter(readers)))
        self.shares, self.state = shares, _state(x)
        return mine


def _state(x: Tensor) -> tuple[Any, ...]:
    return id(x), x._version, torch.is_grad_enabled()
