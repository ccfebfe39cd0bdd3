"""The Hadamard product of two low-rank matrices: rank up to `r^2` from `2 r (in + out)` values."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..part import Delta
from .made import Made
from .row_dropout import RowDropout

if TYPE_CHECKING:
    from ...model.weights import Weight


class Hadamard(RowDropout, Made):
    """`dW = scale (A1 B1) * (A2 B2)`, elementwise.

    It is a product of rank `r^2`: the columns of its factors are all products of a column of A1 and one of A2, the
    rows all products of a row of B1 and one of B2. So it acts as a low-rank branch as long as `r^2` is small beside
    the weight's sides, and through the effective weight beyond.

    Args:
        a1, a2: `out x r`.
        b1, b2: `r x in`.
        scale: multiplies the product.
        row_dropout, module_dropout: see `RowDropout`.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "row_dropout", "module_dropout")

    def __init__(
        self,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        b2: Tensor,
        scale: float = 1.0,
        row_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if a1.shape != a2.shape or b1.shape != b2.shape or a1.shape[1] != b1.shape[0]:
            raise ValueError(f"factors of shapes {[list(t.shape) for t in (a1, b1, a2, b2)]} make no Hadamard product")
        self.a1, self.b1 = nn.Parameter(a1), nn.Parameter(b1)
        self.a2, self.b2 = nn.Parameter(a2), nn.Parameter(b2)
        self.scale, self.row_dropout, self.module_dropout = scale, row_dropout, module_dropout

    @property
    def rank(self) -> int:
        return self.b1.shape[-2] ** 2

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # Wider factors cost more to make than the weight, for however few tokens.
        narrow = 2 * self.rank <= min(weight.shape[-2:])
        return self.dropping() or (narrow and super().prefers_side(tokens, weight))

    def sources(self) -> list[Tensor]:
        return [self.a1, self.b1, self.a2, self.b2]

    def made(self, dtype: torch.dtype, *sources: Tensor) -> tuple[Tensor, Tensor]:
        a1, b1, a2, b2 = (source.to(dtype) for source in sources)
        a = (b1.unsqueeze(1) * b2).flatten(0, 1)
        return a, (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)

    def dense(self) -> Tensor:
        return (self.scale * self.a1 @ self.b1) * (self.a2 @ self.b2)

    def built(self, weight: Tensor) -> Tensor:
        first, second = self._products(weight.dtype)
        return torch.addcmul(weight, first, second, value=self.scale)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        first, second = self._products(change.dtype)
        second.mul_(change).mul_(self.scale)
        first.mul_(change).mul_(self.scale)
        a1, b1, a2, b2 = (tensor.detach().to(change.dtype) for tensor in self.sources())
        return tuple(
            gradient.to(source.dtype)
            for gradient, source in zip(
                (second @ b1.T, a1.T @ second, first @ b2.T, a2.T @ first), self.sources(), strict=True
            )
        )

    def _products(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a1, b1, a2, b2 = (tensor.detach().to(dtype) for tensor in self.sources())
        return a1 @ b1, a2 @ b2


class TuckerHadamard(Delta):
    """The same for a convolution, each product with a core: `dW = scale W1 * W2`, `Wk[o, c, :] = a_k^T t_k b_k`.

    The core holds the kernel, so the factors have the channels alone: `Wk[o, c, u] = sum_ij t_k[i, j, u] a_k[i, o]
    b_k[j, c]`.

    Args:
        t1, t2: `r x r x points of the kernel`.
        a1, a2: `r x out`.
        b1, b2: `r x channels`.
        scale: multiplies the product.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(
        self, t1: Tensor, a1: Tensor, b1: Tensor, t2: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0
    ) -> None:
        super().__init__()
        rank = len(a1)
        if t1.shape != t2.shape or a1.shape != a2.shape or b1.shape != b2.shape or t1.shape[:2] != (rank, len(b1)):
            shapes = [list(t.shape) for t in (t1, a1, b1, t2, a2, b2)]
            raise ValueError(f"cores and factors {shapes} make no product; they are r x r x k, r x out, r x c")
        self.t1, self.a1, self.b1 = nn.Parameter(t1), nn.Parameter(a1), nn.Parameter(b1)
        self.t2, self.a2, self.b2 = nn.Parameter(t2), nn.Parameter(a2), nn.Parameter(b2)
        self.scale = scale

    def dense(self) -> Tensor:
        first, second = (
            torch.einsum("iju,io,jc->ocu", t, a, b)
            for t, a, b in ((self.t1, self.a1, self.b1), (self.t2, self.a2, self.b2))
        )
        return (self.scale * first * second).flatten(1)
