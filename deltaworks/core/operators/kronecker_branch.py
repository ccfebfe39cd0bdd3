"""A Kronecker product beside a sub-layer: `y + s kron(A, B) x`, with or without a learnt share of x itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..init import kaiming, zeros
from ..part import Module, Part
from .bottleneck import Tapped
from .recompute import recomputed


class KroneckerBranch(Part):
    """The tensors of `s kron(A, B) x + s_res x`.

    Args:
        width: of what it reads and gives.
        rows, columns: size of A; both divide the width. B is `width / rows x width / columns`, zero at first.
        scale: s.
        residual: whether there is an s_res, one number, zero at first.
    """

    settings: ClassVar[tuple[str, ...]] = ("width", "rows", "columns", "scale", "residual")

    def __init__(self, width: int, rows: int, columns: int, scale: float = 1.0, residual: bool = False) -> None:
        super().__init__()
        if width % rows or width % columns:
            raise ValueError(f"a factor of {rows} x {columns} does not divide {width} x {width}")
        self.width, self.rows, self.columns, self.scale, self.residual = width, rows, columns, scale, residual
        self.a = nn.Parameter(kaiming(rows, columns))
        self.b = nn.Parameter(zeros(width // rows, width // columns))
        self.s_res = nn.Parameter(torch.zeros(())) if residual else None

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + s kron(A, B) x + s_res x`, both `... x width`; backward keeps x alone."""
        change = recomputed(self._applied, x, self.a, self.b)
        if self.s_res is not None:
            change = change + self.s_res.to(x.dtype) * x
        return y + change.to(y.dtype)

    def _applied(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (a.shape[1], b.shape[1]))
        return self.scale * (a.to(x.dtype) @ blocks @ b.to(x.dtype).T).flatten(-2)


class ParallelKronecker(KroneckerBranch, Module):
    """Beside a module, reading what it reads."""

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.added(y, x)


class TappedKronecker(Tapped, KroneckerBranch):
    """The same beside a sub-layer that spans several modules."""

    settings = (*KroneckerBranch.settings, "place")
