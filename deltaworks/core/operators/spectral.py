"""A delta that is sparse in the frequency domain: the real part of an inverse 2-D Fourier transform of a few entries.

`dW[p, q] = scale / (out in) * sum_l c_l cos(2 pi (p j_l / out + q k_l / in))`. Many entries: one real inverse transform
builds the matrix, whose gradient is one real transform; in half precision products with tables of waves do, of a
quarter of the matrix, as every wave is even or odd along each side, and along the wider side by looking up the waves
that there are. Few entries: a sum of `2 n` waves is a product of two thin tables, which are made on the spot from the
entries and never kept.
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

    costly = any_order = True
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
        # Turned beforehand where it comes first, in the order that products are quickest in.
        waves = _half_waves(self._narrow, weight.dtype, weight.device, self._rows_narrower)
        pairs = zip(waves, self._sums(weight, self.c.detach()), strict=True)
        even, odd = (wave @ sums if self._rows_narrower else sums.T @ wave for wave, sums in pairs)
        made, factor = torch.empty_like(weight, memory_format=torch.contiguous_format), self.scale / weight.numel()
        for part, turns in ((even + odd, ((), (0, 1))), (even.sub_(odd), ((0,), (1,)))):
            for dims in turns:
                place, below, values = made, weight, part
                for dim in (0, 1):
                    start = part.shape[dim] if dim in dims else 0
                    length = made.shape[dim] - start if start else part.shape[dim]
                    place, below = place.narrow(dim, start, length), below.narrow(dim, start, length)
                    values = _mirrored(values.narrow(dim, 1, length), dim) if start else values
                torch.add(below, values, alpha=factor, out=place)
        return made

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        if not self._by_products(change.dtype):
            with torch.enable_grad():
                made = self.dense()
            return torch.autograd.grad(made, (self.c,), change.to(made.dtype))
        with torch.enable_grad():
            sums = self._sums(change, self.c)
        found, turned = [], not change.is_contiguous()
        change = change.T if turned else change
        waves = _half_waves(self._narrow, change.dtype, change.device)
        for wave, half, sign in zip(waves, _folded(change, 0, 1, -1), (1, -1), strict=True):
            (quarter,) = _folded(half, 1, sign)
            found.append(wave @ (quarter if self._rows_narrower != turned else quarter.T))
        (gradient,) = torch.autograd.grad(sums, self.c, found)
        return (gradient.mul_(self.scale / (self.fan_out * self.fan_in)),)

    @property
    def _rows_narrower(self) -> bool:
        return self.fan_out <= self.fan_in

    @property
    def _narrow(self) -> int:
        return min(self.fan_out, self.fan_in)

    @property
    def _wide(self) -> int:
        return max(self.fan_out, self.fan_in)

    def _by_products(self, dtype: torch.dtype) -> bool:
        """Whether products with tables of waves are cheaper than a transform, which half precision lacks."""
        if dtype.itemsize > 2:
            return False
        # As measured on CPUs with matrix units: 450 multiplications in the time of a third of a step of the transform;
        # a wave that is looked up and added costs as much as 25.
        multiplications = self._narrow / 4 + 25 * self.c.shape[-1] / self._narrow
        return multiplications < 450 * 0.3 * math.log2(self.fan_out * self.fan_in)

    def _sums(self, like: Tensor, c: Tensor) -> list[Tensor]:
        """For each frequency of the narrower side, the sum of the waves that meet it on the wider one, times their `c`.

        Cosines, then sines; `frequencies x half of the wider side`, differentiable in `c`.
        """
        order, starts, frequencies, signs = self._meetings()
        values, waves = c[order], _half_waves(self._wide, like.dtype, like.device)
        return [
            nn.functional.embedding_bag(frequencies, wave, starts, mode="sum", per_sample_weights=one.to(like.dtype))
            for wave, one in zip(waves, (values, values * signs), strict=True)
        ]

    def _meetings(self) -> tuple[Tensor, ...]:
        """The entries in the order of their frequency on the narrower side.

        Returns:
            that order; where each frequency of the narrower side starts in it; the frequencies on the wider side; the
            signs of the sines.
        """
        rows, columns = self.fan_out, self.fan_in

        def table(entries: Tensor) -> Tensor:
            j, k = entries.long() // columns, entries.long() % columns
            # An entry and its mirror image through the origin are the same wave.
            mirrored = j > rows // 2
            j, k = torch.where(mirrored, rows - j, j), torch.where(mirrored, -k % columns, k)
            high = k > columns // 2
            k = torch.where(high, columns - k, k)
            narrow, wide = (j, k) if self._rows_narrower else (k, j)
            order = narrow.argsort(stable=True)
            return torch.stack([order, narrow[order], wide[order], 2 * high.long()[order] - 1])

        order, met, frequencies, signs = constant(self.entries, torch.int64, table, "meetings")

        def starts(entries: Tensor) -> Tensor:
            return torch.searchsorted(met, torch.arange(_padded(self._narrow), device=entries.device))

        return order, constant(self.entries, torch.int64, starts, "starts"), frequencies, signs

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # Four products with tables of 2 n columns, against the weight's gradient and building it in both passes.
        n, area = self.c.shape[-1], self.fan_in * self.fan_out
        built = 3 * self._narrow // 4 if weight.dtype.itemsize == 2 else 512  # in tokens
        beside = 4 * n * (self.fan_in + self.fan_out) * tokens
        return 4 * n < self._narrow and beside < area * (tokens + built)

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


def _mirrored(matrix: Tensor, dim: int) -> Tensor:
    # Integers are turned several times faster than numbers of half precision.
    return matrix.view(torch.int16).flip(dim).view(matrix.dtype)


def _folded(matrix: Tensor, dim: int, *signs: int) -> list[Tensor]:
    """For each sign the first half of a matrix along a dimension, with so many times the second added, mirrored."""
    near = matrix.shape[dim] // 2 + 1
    rest = matrix.shape[dim] - near
    first, second = matrix.narrow(dim, 0, near), _mirrored(matrix.narrow(dim, near, rest), dim)
    halves = []
    for sign in signs:
        halves.append(half := torch.empty_like(first, memory_format=torch.contiguous_format))
        torch.add(first.narrow(dim, 1, rest), second, alpha=sign, out=half.narrow(dim, 1, rest))
        for start, length in ((0, 1), (1 + rest, near - 1 - rest)):  # these have no counterpart
            half.narrow(dim, start, length).copy_(first.narrow(dim, start, length))
    return halves


def _padded(size: int) -> int:
    """How many frequencies a table has: the first half of them, and as many more as make its products quick."""
    return -(-(size // 2 + 1) // 32) * 32


@lru_cache(maxsize=16)
def _half_waves(
    size: int, dtype: torch.dtype, device: torch.device, points_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each `frequencies x points`, of the first half of the frequencies (`_padded`) and points."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies, points = torch.arange(_padded(size), device=device), torch.arange(size // 2 + 1, device=device)
        phase = (frequencies.unsqueeze(1) * points % size) * (2 * math.pi / size)
        phase = phase.T.contiguous() if points_first else phase
        return phase.cos().to(dtype), phase.sin().to(dtype)
