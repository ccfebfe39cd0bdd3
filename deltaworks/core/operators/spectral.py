"""A delta that is sparse in the frequency domain: the real part of an inverse 2-D Fourier transform of a few entries.

`dW[p, q] = scale / (out in) * sum_l c_l cos(2 pi (p j_l / out + q k_l / in))`. Many entries: one real inverse transform
builds the matrix, whose gradient is one real transform. Few entries: a sum of `2 n` waves is a product of two thin
tables, which are made on the spot from the entries and never kept.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from .scaled import Scaled


class Spectral(Scaled):
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
