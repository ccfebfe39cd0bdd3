"""A delta that is sparse in the frequency domain: the real part of an inverse 2-D Fourier transform of a few entries.

`dW[p, q] = scale / (out in) * sum_l c_l cos(2 pi (p j_l / out + q k_l / in))`. Many entries: one real inverse transform
builds the matrix, whose gradient is one real transform. Few entries: a sum of `2 n` waves is a product of two thin
tables, which are made on the spot from the entries and never kept.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from .effective import Built
from .made import constant
from .scaled import Scaled


class Spectral(Scaled, Built):
    """`dW = scale * Re(ifft2(F))`, with `F[j_l, k_l] = c_l` and zero elsewhere.

    Args:
        c: coefficients, `n`, trained.
        entries: positions `j * in + k` of the coefficients in the `out x in` grid, `n` different integers.
        fan_out, fan_in: size of the matrix.
        scale: multiplies the transform.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in", "scale")
    entries: Tensor

    def __init__(self, c: Tensor, entries: Tensor, fan_out: int, fan_in: int, scale: float = 1.0) -> None:
        super().__init__()
        size = fan_out * fan_in
        real = entries.numel() and not entries.is_meta
        if c.shape != entries.shape or (real and not 0 <= int(entries.min()) <= int(entries.max()) < size):
            raise ValueError(f"{len(c)} coefficients need as many positions, all below {size} ({fan_out} x {fan_in})")
        self.c = nn.Parameter(c)
        self.register_buffer("entries", entries.to(torch.int32 if size < 2**31 else torch.int64))
        self.fan_out, self.fan_in, self.scale = fan_out, fan_in, float(scale)

    def dense(self) -> Tensor:
        # Re(ifft2(F)) is the inverse real transform of the Hermitian part of F: half of every coefficient at its place
        # and half at the mirrored one, of which the transform reads those in the first half of the columns.
        rows, half = self.fan_out, self.fan_in // 2 + 1
        j, k = self._places()
        j, k = torch.cat([j, -j % rows]), torch.cat([k, -k % self.fan_in])
        inside = k < half
        flat = torch.where(inside, j * half + k, 0)
        values = torch.where(inside, torch.cat([self.c, self.c]) / 2, 0.0)
        spectrum = torch.zeros(rows * half, dtype=values.dtype, device=values.device).index_add(0, flat, values)
        spectrum = torch.complex(spectrum, torch.zeros_like(spectrum)).view(rows, half)
        return self.scale * torch.fft.irfft2(spectrum, s=(rows, self.fan_in))

    def built(self, weight: Tensor) -> Tensor:
        if not self._by_products(weight.dtype):
            return self.fold(weight)
        rows, columns, turned = self._orientation()
        left, cos, sin = _tables(rows, columns, weight.dtype, weight.device)
        places, signs = self._grid()
        values = self.c.detach()
        grid = values.new_zeros(2, (rows // 2 + 1) * (columns // 2 + 1))
        grid[0].index_add_(0, places, values)
        grid[1].index_add_(0, places, values * signs)
        grid = grid.to(weight.dtype).view(2, rows // 2 + 1, -1)
        inner, factor = torch.cat([grid[0] @ cos, grid[1] @ sin]), self.scale / (rows * columns)
        return torch.addmm(weight, *((inner.T, left.T) if turned else (left, inner)), alpha=factor)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        if not self._by_products(change.dtype):
            with torch.enable_grad():
                made = self.dense()
            return torch.autograd.grad(made, (self.c,), change.to(made.dtype))
        rows, columns, turned = self._orientation()
        left, cos, sin = _tables(rows, columns, change.dtype, change.device)
        places, signs = self._grid()
        first, second = (left.T @ (change.T if turned else change)).chunk(2)
        found = [(half @ table.T).flatten()[places].to(self.c.dtype) for half, table in ((first, cos), (second, sin))]
        return ((found[0] + found[1] * signs).mul_(self.scale / (rows * columns)),)

    def _by_products(self, dtype: torch.dtype) -> bool:
        """Whether two dense products with tables of waves are cheaper than a transform, which half precision lacks."""
        if dtype.itemsize > 2:
            return False
        rows, columns, _ = self._orientation()
        area = rows * columns
        # As measured on CPUs with matrix units: 450 multiplications in the time of a third of a step of the transform.
        return area * (rows + columns / 2) < 450 * 0.3 * area * math.log2(area)

    def _orientation(self) -> tuple[int, int, bool]:
        """Rows and columns, exchanged where that is less work, and whether they are."""
        out, width = self.fan_out, self.fan_in
        return (width, out, True) if width < out else (out, width, False)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Where each entry stands among the waves of not more than half the rows and columns, and the sine's sign."""
        rows, columns, turned = self._orientation()

        def folded(entries: Tensor) -> tuple[Tensor, Tensor]:
            first, second = entries.long() // self.fan_in, entries.long() % self.fan_in
            j, k = (second, first) if turned else (first, second)
            # An entry and its mirror image through the origin are the same wave.
            mirrored = j > rows // 2
            j, k = torch.where(mirrored, rows - j, j), torch.where(mirrored, -k % columns, k)
            high = k > columns // 2
            return j * (columns // 2 + 1) + torch.where(high, columns - k, k), 1 - 2 * high.long()

        places = constant(self.entries, torch.int64, lambda entries: folded(entries)[0], "places")
        return places, constant(self.entries, self.c.dtype, lambda entries: folded(entries)[1], "signs")

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return 8 * self.c.shape[-1] < min(self.fan_out, self.fan_in)

    def bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        j, k = self._places()
        a, b = self._waves(k, self.fan_in).T, self._waves(j, self.fan_out) / (self.fan_out * self.fan_in)
        return a.to(dtype), b.to(dtype)

    def scales(self) -> tuple[Tensor, None]:
        return torch.cat([self.c, -self.c]), None

    def _places(self) -> tuple[Tensor, Tensor]:
        entries = self.entries.long()
        return entries // self.fan_in, entries % self.fan_in

    def _waves(self, frequencies: Tensor, size: int) -> Tensor:
        """Cosines and sines of the frequencies over `size` points, `size x 2n`; the phase is reduced in integers."""
        points = torch.arange(size, device=frequencies.device)
        turn = points.to(self.c.dtype) * (2 * math.pi / size)
        phase = points.unsqueeze(1) * frequencies % size
        return torch.cat([turn.cos()[phase], turn.sin()[phase]], dim=1)


@lru_cache(maxsize=16)
def _tables(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Waves of half the frequencies: cosines and negated sines, `rows x 2 (rows/2 + 1)`, and of the other axis cosines
    and sines, `columns/2 + 1 x columns` each."""
    with torch.inference_mode(False), torch.no_grad():
        cos, sin = _waves(rows, device)
        over_rows = torch.cat([cos.T, -sin.T], dim=1).to(dtype)
        cos, sin = _waves(columns, device)
        return over_rows, cos.to(dtype), sin.to(dtype)


def _waves(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    points = torch.arange(size, device=device)
    phase = (torch.arange(size // 2 + 1, device=device).unsqueeze(1) * points % size) * (2 * math.pi / size)
    return phase.cos(), phase.sin()
