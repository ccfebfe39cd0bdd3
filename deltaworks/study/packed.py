"""Quantised layers on shapes: as large as they are stored, as wide as they compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..model.anatomy import Anatomy
from ..model.loading import QUANTISED
from .shapes import Shapes

# What stands for a packed weight: a float of one byte, which the library knows for quantised.
PACKED = torch.float8_e4m3fn
NF4_BLOCK = 64
# torchao's product keeps the unpacked weight for the backward pass, bitsandbytes' unpacks it there again.
KEEPING = ("int8", "int4")
GROUPS = (128, 64, 32, 16)


def stored_bytes(kind: str, shape: Sequence[int], dtype: torch.dtype, group: int = 128) -> int:
    """What a weight takes in a form of `QUANTISED`, scales and all.

    Args:
        kind: "int8" (a float32 scale and a zero point a row), "int4" (a byte a value, scale and zero point a group) or
            "nf4" (half a byte a value, one float32 for every 64).
        shape: `out x in`.
        dtype: of the scales.
        group: inputs that share one, for int4.
    """
    values, rows = math.prod(shape), shape[0]
    if kind == "int8":
        return values + rows * 5
    if kind == "int4":
        return values + values // group * (dtype.itemsize + 1)
    if kind == "nf4":
        return -(-values // 2) + 4 * -(-values // NF4_BLOCK)
    raise ValueError(f"--quantize {kind}: there is {', '.join(QUANTISED)}")


def choose(anatomy: Anatomy, kind: str) -> list[str]:
    """Paths of the layers that loading quantises: linear ones inside the blocks, for nf4 GPT-2's kind as well."""
    kinds: tuple[type, ...] = (nn.Linear, Conv1D) if kind == "nf4" else (nn.Linear,)
    paths = dict.fromkeys(site.path for site in anatomy.select("all") if site.kind == "linear" and site.called)
    return [path for path in paths if type(anatomy.model.get_submodule(path)) in kinds]


def pack(model: nn.Module, paths: list[str], kind: str, shapes: Shapes) -> None:
    """Put packed weights into layers of an emptied model."""
    widths = math.gcd(*(cast(Any, model.get_submodule(path)).weight.shape[-1] for path in paths)) if paths else 0
    group = next((size for size in GROUPS if widths % size == 0), GROUPS[-1])  # loading refuses other widths
    for path in paths:
        layer: Any = model.get_submodule(path)
        weight, turned = layer.weight, isinstance(layer, Conv1D)
        layer.__class__ = _Turned if turned else _Packed
        layer.keeps = kind in KEEPING
        packed = shapes.make(weight.shape, None, PACKED)
        shapes.ledger.hold(packed)
        shape = weight.shape[::-1] if turned else weight.shape
        shapes.ledger.resize(packed, stored_bytes(kind, shape, weight.dtype, group))
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.weight_scale = shapes.make((1,) * weight.dim(), None, weight.dtype)


class _Packed(nn.Linear):
    """A linear layer that unpacks its weight whenever it is used."""

    keeps: bool

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.bias, False, self.keeps)  # type: ignore[return-value]


class _Turned(Conv1D):
    """The same for a weight that is stored `in x out`."""

    keeps: bool

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.bias, True, self.keeps)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """`x W^T + bias` with W unpacked in forward, and kept for backward or unpacked there again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, keeps: bool) -> Tensor:
        whole = weight.to(x.dtype)
        ctx.save_for_backward(whole if keeps and ctx.needs_input_grad[0] else weight)
        ctx.turned = turned
        return nn.functional.linear(x, whole.T if turned else whole, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        whole = weight.to(gradients[0].dtype)
        return gradients[0] @ (whole.T if ctx.turned else whole), None, None, None, None
