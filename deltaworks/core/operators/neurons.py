"""Some rows or some columns of a matrix: the incoming or the outgoing weights of chosen neurons.

For rows the change of the output is `x D^T`, written to `k` output features; for columns it is `x[:, cols] D^T`, and
only that slice of the input is kept for backward, a few channels where a trainable layer keeps them all.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from ..part import Delta
from .low_rank import base_product
from .saving import save, saved


class Neurons(Delta):
    """`W'[index] = W[index] + D` (rows) or `W'[:, index] = W[:, index] + D^T` (columns).

    Args:
        d: `k x in` for rows, `k x out` for columns: one vector a neuron.
        index: which rows or columns, ascending. For fused experts, `expert * size + row`.
        size: number of rows (or columns) of the whole matrix, of one expert's where there are several.
        columns: whether the neurons are columns.
        experts: number of matrices in a fused parameter, None for a plain weight.
    """

    settings: ClassVar[tuple[str, ...]] = ("size", "columns", "experts")
    index: Tensor

    def __init__(self, d: Tensor, index: Tensor, size: int, columns: bool = False, experts: int | None = None) -> None:
        super().__init__()
        if d.dim() != 2 or index.dim() != 1 or len(index) != len(d):
            raise ValueError(f"{list(index.shape)} neurons were chosen and vectors of shape {list(d.shape)} given")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size * (experts or 1):
            raise ValueError(f"neurons were chosen outside a matrix of {size * (experts or 1)}")
        self.d = nn.Parameter(d)
        self.size, self.columns, self.experts = size, columns, experts
        self.register_buffer("index", index)

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """Fused experts have no call of their own that a side path could join."""
        return self.experts is None

    def dense(self) -> Tensor:
        whole = self.d.new_zeros(self.size * (self.experts or 1), self.d.shape[1]).index_copy(0, self.index, self.d)
        if self.experts is not None:
            whole = whole.unflatten(0, (self.experts, self.size))
        return whole.mT if self.columns else whole

    def side(self, x: Tensor) -> Tensor:
        d = self.d.to(x.dtype)
        if self.columns:
            return x[..., self.index] @ d
        return x.new_zeros(*x.shape[:-1], self.size).index_copy(-1, self.index, x @ d.T)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        d = self.d.to(x.dtype)
        if self.columns:
            return y + (x[..., self.index] @ d).to(y.dtype)
        return y.index_add(-1, self.index, (x @ d.T).to(y.dtype))

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or weight.dtype != x.dtype:
            return None
        if type(x) not in (Tensor, nn.Parameter) or x.numel() == 0:
            return None
        function = _Columns if self.columns else _Rows
        return function.apply(x, weight, bias, self.d, self.index)  # type: ignore[return-value]


class _Rows(torch.autograd.Function):
    """`y = x W^T + bias; y[:, index] += x D^T` with W and bias frozen; keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, index: Tensor) -> Tensor:
        y, rows = base_product(x, weight, bias)
        rows.index_add_(-1, index, x.reshape(-1, x.shape[-1]) @ d.to(x.dtype).T)
        save(ctx, x if ctx.needs_input_grad[3] else None, weight, d, index)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, d, index = saved(ctx)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        chosen = g.index_select(-1, index)
        dd = (chosen.T @ x.reshape(-1, x.shape[-1])).to(d.dtype) if x is not None else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).addmm_(chosen, d.to(g.dtype)).view(*gradients[0].shape[:-1], -1)
        return dx, None, None, dd, None


class _Columns(torch.autograd.Function):
    """`y = x W^T + bias + x[:, index] D` with W and bias frozen; keeps the slice of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, index: Tensor) -> Tensor:
        y, rows = base_product(x, weight, bias)
        part = x.reshape(-1, x.shape[-1]).index_select(-1, index)
        rows.addmm_(part, d.to(x.dtype))
        ctx.save_for_backward(part if ctx.needs_input_grad[3] else None, weight, d, index)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        part, weight, d, index = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        dd = (part.T @ g).to(d.dtype) if part is not None else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).index_add_(-1, index, g @ d.to(g.dtype).T).view(*gradients[0].shape[:-1], -1)
        return dx, None, None, dd, None
