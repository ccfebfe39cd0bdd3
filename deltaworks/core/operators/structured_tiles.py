"""Square tiles of structured matrices, applied by the fast Fourier transform.

The weight is cut into `n x n` tiles, `out/n x in/n` of them, each made of two vectors (or p pairs):

- circulant: `Circ(b * a)`, first column `b * a`
- toeplitz: `T(b) T(a)`, `T(v)[p, q] = v[|p - q|]`
- ldr: `sum_t Circ(b_t) Skew(a_t)`, `Skew` a circulant whose entries above the diagonal change sign

A tile costs `n log n` a token where the matrix costs `n^2`; transforms run in single precision or better.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

from ...model.weights import Weight
from .circulant import transforms_pay, with_circulant, wrapped_diagonals
from .effective import Built
from .low_rank import dropped
from .recompute import recomputed

STRUCTURES = ("circulant", "toeplitz", "ldr")


class StructuredTiles(Built):
    """A grid of structured tiles.

    Args:
        a, b: vectors, `out/n x in/n x p x n` (p > 1 for ldr only).
        structure: one of `STRUCTURES`.
        scale: multiplies the matrix.
        dropout: probability of zeroing an input feature in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("structure", "scale", "dropout")
    lean = True

    def __init__(self, a: Tensor, b: Tensor, structure: str, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if a.dim() != 4 or a.shape != b.shape or structure not in STRUCTURES:
            raise ValueError(f"vectors {list(a.shape)} and {list(b.shape)} of structure {structure!r} make no tiles")
        if structure != "ldr" and a.shape[2] != 1:
            raise ValueError(f"a {structure} tile is made of one pair of vectors, not of {a.shape[2]}")
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.structure, self.scale, self.dropout = structure, float(scale), float(dropout)

    def dense(self) -> Tensor:
        width = self.a.shape[1] * self.a.shape[3]
        return self._applied(torch.eye(width, dtype=self.a.dtype, device=self.a.device), self.a, self.b).mT

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        if self.dropout and self.training:
            return True
        rows, columns, pairs, n = self.a.shape
        if self.structure == "circulant":
            return transforms_pay(n, tokens, weight)
        # The other structures' matrices are made by their transforms as well, of as many rows as the weight has inputs,
        # and have a gradient then, one product a token.
        each = (rows + columns + 2 * rows * columns * pairs) * n
        product = weight.fan_in * weight.fan_out / (7200 if weight.dtype.itemsize == 2 else 432)
        return tokens * each < 1.5 * weight.fan_in * each + tokens * product

    def built(self, weight: Tensor) -> Tensor:
        if self.structure != "circulant":
            return self.fold(weight)
        return with_circulant(weight, _rows((self.b * self.a).detach().squeeze(2)), self.scale)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        a, b = self.a.detach(), self.b.detach()
        if self.structure != "circulant":
            with torch.enable_grad():
                made = self.dense()
            return torch.autograd.grad(made, (self.a, self.b), change.to(made.dtype))
        slope = _rows(wrapped_diagonals(change, a.shape[-1])).unsqueeze(2).to(a.dtype).mul_(self.scale)
        return slope * b, slope * a

    def side(self, x: Tensor) -> Tensor:
        return recomputed(self._applied, dropped(self, x), self.a, self.b)

    def _applied(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        n = a.shape[-1]
        # Half precision has no transform, and autocast leaves these operations alone.
        exact = torch.promote_types(x.dtype, torch.float32)
        blocks, a, b = x.to(exact).unflatten(-1, (-1, n)), a.to(exact), b.to(exact)
        if self.structure == "circulant":
            y = irfft(torch.einsum("...jf,ijf->...if", rfft(blocks), rfft((b * a).squeeze(2))), n)
        elif self.structure == "ldr":
            size = 2 * n
            z = irfft(torch.einsum("...jf,ijtf->...ijtf", rfft(blocks, size), rfft(a, size)), size)
            skewed = rfft(z[..., :n] - z[..., n:])
            y = irfft(torch.einsum("...ijtf,ijtf->...if", skewed, rfft(b)), n)
        else:
            size = 2 * n
            inner = irfft(torch.einsum("...jf,ijf->...ijf", rfft(blocks, size), _symmetric(a.squeeze(2))), size)
            spectrum = torch.einsum("...ijf,ijf->...if", rfft(inner[..., :n], size), _symmetric(b.squeeze(2)))
            y = irfft(spectrum, size)[..., :n]
        return (y.flatten(-2) * self.scale).to(x.dtype)


def _rows(columns: Tensor) -> Tensor:
    """First rows of circulants from their first columns, and the other way round."""
    return torch.cat([columns[..., :1], columns[..., 1:].flip(-1)], dim=-1)


def _symmetric(v: Tensor) -> Tensor:
    """Spectrum of the circulant of twice the size whose first corner is the symmetric Toeplitz matrix of v."""
    return rfft(torch.cat([v, torch.zeros_like(v[..., :1]), v[..., 1:].flip(-1)], dim=-1))
