"""The Hadamard product of two low-rank matrices: rank up to `r^2` from `2 r (in + out)` values."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..part import Delta


class Hadamard(Delta):
    """`dW = scale (A1 B1) * (A2 B2)`, elementwise.

    It does not factor over activations, so the effective weight is built, once a pass, and kept by nobody: backward
    builds it again from the factors.

    Args:
        a1, a2: `out x r`.
        b1, b2: `r x in`.
        scale: multiplies the product.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        if a1.shape != a2.shape or b1.shape != b2.shape or a1.shape[1] != b1.shape[0]:
            raise ValueError(f"factors of shapes {[list(t.shape) for t in (a1, b1, a2, b2)]} make no Hadamard product")
        self.a1, self.b1 = nn.Parameter(a1), nn.Parameter(b1)
        self.a2, self.b2 = nn.Parameter(a2), nn.Parameter(b2)
        self.scale = scale

    def dense(self) -> Tensor:
        return (self.scale * self.a1 @ self.b1) * (self.a2 @ self.b2)
