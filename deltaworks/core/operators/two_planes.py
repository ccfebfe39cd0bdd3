"""A change of two scales: `dW = scale * Bo Ao diag(e) Bi Ai`, low rank within low rank."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .low_rank import Factored


class TwoPlanes(Factored):
    """`dW = scale * left_out left diag(e) right right_in`, `r` components between outer factors of width `k`.

    Args:
        left_out: `out x k`.
        left: `k x r`.
        e: `r`, the weights of the components.
        right: `r x k`.
        right_in: `k x in`.
        scale: multiplies the change.
        dropout: probability of zeroing an input feature of the branch in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")

    def __init__(
        self,
        left_out: Tensor,
        left: Tensor,
        e: Tensor,
        right: Tensor,
        right_in: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        k, r = left_out.shape[-1], len(e)
        if left.shape != (k, r) or right.shape != (r, k) or right_in.shape[0] != k:
            shapes = [list(t.shape) for t in (left_out, left, e, right, right_in)]
            raise ValueError(f"{shapes} do not fit; they are out x k, k x r, r, r x k, k x in")
        self.left_out, self.left, self.e = nn.Parameter(left_out), nn.Parameter(left), nn.Parameter(e)
        self.right, self.right_in = nn.Parameter(right), nn.Parameter(right_in)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.right_in.shape[-2]

    def factors(self) -> tuple[Tensor, Tensor]:
        # The middle is k x k, so the product is that of a LoRA of rank k.
        middle: Tensor = (self.left * self.e) @ self.right
        return self.right_in, torch.matmul(self.left_out, middle)
