"""A matrix of circulant blocks, applied by the fast Fourier transform.

Block `(i, j)` holds one vector `w_ij` of length `b`, its first row, every further row shifted by one:
`dW[i b + p, j b + q] = scale * w_ij[(q - p) mod b]`. A product costs `b log b` where the matrix costs `b^2`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fft import irfft, rfft

from ...model.weights import Weight
from .effective import Built
from .low_rank import dropped, kept, plain
from .saving import save, saved


class Circulant(Built):
    """A block-circulant delta.

    Args:
        w: first rows of the blocks, `out/b x in/b x b`.
        scale: multiplies the matrix.
        dropout: probability of zeroing an input feature in training.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    lean = True

    def __init__(self, w: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if w.dim() != 3:
            raise ValueError(f"circulant blocks are out/b x in/b x b, not {list(w.shape)}")
        self.w = nn.Parameter(w)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def block(self) -> int:
        """b, the side of a block."""
        return self.w.shape[-1]

    def dense(self) -> Tensor:
        rows, columns, b = self.w.shape
        points = torch.arange(b, device=self.w.device)
        blocks = self.w[..., (points - points.unsqueeze(1)) % b]  # out/b x in/b x p x q
        return self.scale * blocks.transpose(1, 2).reshape(rows * b, columns * b)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return bool(self.dropout and self.training) or transforms_pay(self.block, tokens, weight)

    def built(self, weight: Tensor) -> Tensor:
        return with_circulant(weight, self.w.detach(), self.scale)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        return (wrapped_diagonals(change, self.block).to(self.w.dtype).mul_(self.scale),)

    def side(self, x: Tensor) -> Tensor:
        if plain(self, x):
            survive, scale = kept(self, x)
            return _Convolve.apply(x, self.w, scale, survive)  # type: ignore[return-value]
        return _forward(dropped(self, x), self.w, self.scale)


def transforms_pay(block: int, tokens: int, weight: Weight) -> bool:
    """Whether transforming activations is cheaper than building the weight and finding its whole gradient."""
    if block < 32:  # complex products of small blocks are slow
        return False
    # Measured on CPUs with matrix units for half precision, in passes over as many values: five transforms a step at
    # three passes each, against some passes over the weight and its gradient, one product a token.
    area, half = weight.fan_in * weight.fan_out, weight.dtype.itemsize == 2
    return 7.5 * tokens * (weight.fan_in + weight.fan_out) < area * (2 + tokens / (400 if half else 24))


def with_circulant(weight: Tensor, w: Tensor, scale: float) -> Tensor:
    """A weight (`out x in`) with circulant blocks added, whose first rows are `w`, `out/b x in/b x b`."""
    rows, columns, b = w.shape
    # Read with a row of one value less, a vector repeated over and over is the circulant matrix.
    flat = (w.to(weight.dtype) * scale).unsqueeze(2).expand(-1, -1, b, -1).contiguous()
    blocks = flat.as_strided((rows, b, columns, b), (columns * b * b, b - 1, b * b, 1))
    return torch.add(weight.reshape(rows, b, columns, b), blocks).view(weight.shape)


def wrapped_diagonals(matrix: Tensor, b: int) -> Tensor:
    """Of every block of `b x b` the sums along its diagonals, `out/b x in/b x b`: what `with_circulant` pulls back."""
    rows, columns = matrix.shape[0] // b, matrix.shape[1] // b
    blocks = matrix.view(rows, b, columns, 1, b).transpose(1, 2)
    flat = blocks.expand(-1, -1, -1, 2, -1).contiguous()  # every row twice, so that diagonals need no wrapping
    return flat.as_strided((rows, columns, b, b), (columns * 2 * b * b, 2 * b * b, 2 * b + 1, 1)).sum(2)


def _exact(x: Tensor) -> Tensor:
    # There is no transform of half precision on most devices, and its rounding would spread over the whole block.
    return x if x.dtype == torch.float64 else x.float()


def _blocks(x: Tensor, b: int) -> Tensor:
    return _exact(x).reshape(-1, x.shape[-1] // b, b)


def _forward(x: Tensor, w: Tensor, scale: float) -> Tensor:
    b = w.shape[-1]
    spectrum = torch.einsum("tjf,ijf->tif", rfft(_blocks(x, b)), rfft(_exact(w)).conj())
    return (irfft(spectrum, n=b) * scale).to(x.dtype).reshape(*x.shape[:-1], w.shape[0] * b)


class _Convolve(torch.autograd.Function):
    """`(kept x) dW^T`; keeps `x` and the first rows, transforms again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scale: float, survive: Tensor | None) -> Tensor:
        ctx.scale = scale
        save(ctx, x, w, survive)
        return _forward(x if survive is None else x * survive, w, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, w, survive = saved(ctx)
        b = w.shape[-1]
        g = rfft(_blocks(gradients[0], b) * ctx.scale)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = irfft(torch.einsum("tif,ijf->tjf", g, rfft(_exact(w))), n=b).to(x.dtype).reshape(x.shape)
            dx = dx if survive is None else dx.mul_(survive)
        if ctx.needs_input_grad[1]:
            seen = rfft(_blocks(x if survive is None else x * survive, b))
            dw = irfft(torch.einsum("tif,tjf->ijf", g.conj(), seen), n=b).to(w.dtype)
        return dx, dw, None, None
