"""A Kronecker product for a convolution whose second factor has a core."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kronecker import Kronecker


class TuckerKronecker(Kronecker):
    """`dW = scale kron(W1, W2)` with `W2[o, c, u] = sum_ij t2[i, j, u] a[i, o] b[j, c]`.

    The core holds the kernel, so that W2's factors have the channels alone.

    Args:
        t2: `r x r x points of the kernel`.
        w2_a: a, `r x o2`.
        w2_b: b, `r x c2`.
        w1, w1_a, w1_b, scale, row_dropout, module_dropout, rescale: see `Kronecker`.
    """

    def __init__(
        self,
        t2: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        w1: Tensor | None = None,
        w1_a: Tensor | None = None,
        w1_b: Tensor | None = None,
        scale: float = 1.0,
        row_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rescale: bool = True,
    ) -> None:
        if t2.dim() != 3 or t2.shape[:2] != (len(w2_a), len(w2_b)):
            shapes = [list(t.shape) for t in (t2, w2_a, w2_b)]
            raise ValueError(f"a core and factors of shapes {shapes} make no factor; they are r x r x k, r x o, r x c")
        super().__init__(w1, None, w1_a, w1_b, w2_a, w2_b, scale, row_dropout, module_dropout, rescale)
        self.t2 = nn.Parameter(t2)

    def _factors(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *first, a, b, core = tensors
        product = first[0] @ first[1] if len(first) == 2 else first[0]
        return product, torch.einsum("iju,io,jc->ocu", core, a, b).flatten(1)
