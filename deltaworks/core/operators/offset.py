"""A vector added to a parameter that is a vector: a bias, a norm's scale or shift.

The smallest delta there is. Training the parameter itself would be the same function; adding beside it leaves the base
as it was, so adapters of this kind stack, switch and detach like any other.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..part import Delta


class Offset(Delta):
    """`b' = b + v`, or `b'[index] = b[index] + v` where only some entries train.

    Args:
        v: what is added: `size`, or one value for each entry of `index`.
        index: the entries that train, ascending; None for all.
        size: length of the whole parameter, needed with `index`.
    """

    settings: ClassVar[tuple[str, ...]] = ("size",)
    index: Tensor | None

    def __init__(self, v: Tensor, index: Tensor | None = None, size: int | None = None) -> None:
        super().__init__()
        if v.dim() != 1 or (index is not None and (size is None or index.shape != v.shape)):
            raise ValueError(f"an offset is a vector, one index for each value; its values have shape {list(v.shape)}")
        if index is not None and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < int(size or 0):
            raise ValueError(f"an offset has indices outside a parameter of {size} values")
        self.v = nn.Parameter(v)
        self.size = size
        self.register_buffer("index", index)

    def dense(self) -> Tensor:
        if self.index is None:
            return self.v
        return self.v.new_zeros(self.size or 0).index_put((self.index,), self.v)
