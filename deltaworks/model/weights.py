"""One weight of a layer as a matrix, `out x in`, however the layer stores it.

Layers disagree about layout: GPT-2's Conv1D keeps `in x out`, an embedding `vocabulary x width`, a convolution
`out x in x kernel`, fused experts `experts x out x in`, a quantised layer packed integers. Everything above this
module sees one convention: `out x in` (with a leading `experts` axis where a parameter holds several matrices, and a
plain vector where it is one). For an embedding the input is the one-hot token, hence `width x vocabulary`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def consumes(layer: nn.Module) -> str:
    """How a layer uses its weight: "linear", "embedding", "convolution", or "other"."""
    if isinstance(layer, (nn.Linear, Conv1D)):
        return "linear"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "convolution" if isinstance(layer, CONVOLUTIONS) else "other"


def is_ordinary(tensor: Any) -> bool:
    """Whether a tensor is its storage and no subclass; a shape without values (FakeTensor) stands for such a one."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor)


def is_quantised(tensor: Tensor) -> bool:
    """Whether a parameter's storage is not its value: bitsandbytes' packed integers, torchao's tensor subclasses."""
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        return True
    if type(tensor) in (Tensor, nn.Parameter):  # an answer that compilation can follow
        return False
    return (
        hasattr(tensor, "quant_state")
        or hasattr(tensor, "SCB")
        or type(tensor).__module__.startswith("torchao")
        or type(tensor.data).__module__.startswith("torchao")
    )


def dequantised(layer: nn.Module, tensor: Tensor) -> Tensor:
    """The value of a parameter in the layer's storage layout, as an ordinary floating point tensor."""
    if not is_quantised(tensor):
        return tensor
    if getattr(tensor, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(tensor.data, tensor.quant_state)  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(tensor, "SCB"):
        from bitsandbytes.functional import int8_vectorwise_dequant

        scale = tensor.SCB if tensor.SCB is not None else layer.state.SCB  # type: ignore[union-attr]
        return int8_vectorwise_dequant(tensor.data, cast(Tensor, scale))
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        return _from_float8(layer, tensor)
    return tensor.data.dequantize()  # type: ignore[operator]


def _from_float8(layer: nn.Module, tensor: Tensor) -> Tensor:
    """The value of a float8 weight whose layer keeps its scales, one a block, row or tensor."""
    for name in ("weight_scale_inv", "weight_scale"):
        scale = getattr(layer, name, None)
        if isinstance(scale, Tensor):
            whole = scale.float()
            for dim in range(whole.dim()):
                if whole.shape[dim] != tensor.shape[dim]:
                    repeats = -(-tensor.shape[dim] // whole.shape[dim])
                    whole = whole.repeat_interleave(repeats, dim)[(slice(None),) * dim + (slice(tensor.shape[dim]),)]
            return tensor.float() * whole
    raise ValueError(f"{type(layer).__name__} keeps float8 weights without a known scale; load the base unquantised")


def keep_differentiable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on CPUs, and undo it where it has.

    In eval mode its layers rewrite their weights, at the first call, for a kernel without gradient; training through
    them would then go wrong in silence.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            weight: Any = module.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

                weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                    weight.data, weight.quant_state
                )


class Weight:
    """A view of one parameter (or of some output rows of it) as a matrix `out x in`.

    Attributes:
        layer: the module that owns the parameter.
        parameter: its name in the layer.
        rows: the output rows this view covers (indices), or None for all.
    """

    def __init__(self, layer: nn.Module, parameter: str = "weight", rows: Sequence[int] | None = None, path: str = ""):
        self.layer, self.parameter, self.path = layer, parameter, path
        self.rows = rows
        self.known: Tensor | None = None  # the rows as an index, where someone keeps one

    @property
    def stored(self) -> Tensor | None:
        """The parameter as the layer holds it (never an effective weight); None for a bias that is not there."""
        return self.layer._parameters.get(self.parameter)

    @property
    def quantised(self) -> bool:
        return self.stored is not None and is_quantised(self.stored)

    @property
    def transposed(self) -> bool:
        """Whether the layer stores the transpose of the canonical matrix."""
        if self.parameter == "bias":
            return False
        if isinstance(self.layer, (Conv1D, nn.Embedding)):
            return True
        return bool(getattr(self.layer, "is_transposed", False)) and self.stored is not None and self.stored.dim() == 3

    def canonical(self, tensor: Tensor) -> Tensor:
        """`tensor`, laid out as the layer stores this parameter, as `out x in`: a view where possible."""
        if self.transposed:
            return tensor.transpose(-1, -2)
        if isinstance(self.layer, CONVOLUTIONS) and self.parameter == "weight":
            return tensor.flatten(1)
        return tensor

    def layout(self, matrix: Tensor) -> Tensor:
        """The inverse of `canonical`: `out x in` as the layer stores it."""
        if self.transposed:
            return matrix.transpose(-1, -2)
        if isinstance(self.layer, CONVOLUTIONS) and self.parameter == "weight":
            return matrix.reshape(matrix.shape[0], *cast(Tensor, self.stored).shape[1:])
        return matrix

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the whole canonical parameter, rows not selected."""
        stored = self.stored
        if stored is None:
            return (_outputs(self.layer),)
        if self.quantised and self.parameter == "weight" and isinstance(self.layer, nn.Linear):
            return (self.layer.out_features, self.layer.in_features)
        shape = tuple(stored.shape)
        if self.transposed:
            return (*shape[:-2], shape[-1], shape[-2])
        if isinstance(self.layer, CONVOLUTIONS) and self.parameter == "weight":
            return (shape[0], int(torch.Size(shape[1:]).numel()))
        return shape

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`; `(experts, out, in)` for fused experts; `(size,)` for a vector."""
        full = self.full_shape
        if self.rows is None:
            return full
        return (len(self.rows),) if len(full) == 1 else (*full[:-2], len(self.rows), full[-1])

    @property
    def fan_in(self) -> int:
        return self.shape[-1]

    @property
    def fan_out(self) -> int:
        return self.shape[-2:][0]

    @property
    def experts(self) -> int | None:
        """Number of matrices in a fused expert parameter, None for an ordinary weight."""
        return self.full_shape[0] if len(self.full_shape) == 3 else None

    @property
    def device(self) -> torch.device:
        return self.stored.device if self.stored is not None else next(self.layer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layer computes in (for a quantised weight, that of its dequantised value)."""
        stored = self.stored
        if stored is None:
            stored = next(self.layer.parameters())
        if stored.is_floating_point() and stored.dtype.itemsize > 1:
            return stored.dtype
        state = getattr(stored, "quant_state", None)
        return state.dtype if state is not None else torch.get_default_dtype()

    def matrix(self) -> Tensor:
        """The weight as the model computes with it, `out x in`, dequantised, without gradient."""
        stored = self.stored
        if stored is None:
            value = torch.zeros(self.full_shape, device=self.device, dtype=self.dtype)
        else:
            value = self.canonical(dequantised(self.layer, stored).detach())
        return value if self.rows is None else value.index_select(-2 if value.dim() > 1 else 0, self.index())

    def dense(self) -> Tensor:
        """The weight for decompositions: as `matrix`, at least in float32."""
        value = self.matrix()
        return value if value.dtype == torch.float64 else value.float()

    def bias(self) -> Tensor | None:
        """The layer's bias for these rows, or None."""
        bias = self.layer._parameters.get("bias")
        return bias if bias is None or self.rows is None else bias[self.index()]

    def index(self) -> Tensor:
        """`rows` as an index tensor on the weight's device."""
        if self.known is not None:
            return self.known
        return torch.tensor(cast(list, self.rows), device=self.device, dtype=torch.long)

    def replaced(self, part: Tensor, whole: Tensor | None = None) -> Tensor:
        """The whole canonical parameter with these rows replaced by `part`."""
        if self.rows is None:
            return part
        if whole is None:
            whole = Weight(self.layer, self.parameter).matrix()
        return whole.index_copy(-2 if whole.dim() > 1 else 0, self.index(), part.to(whole.dtype))

    def __repr__(self) -> str:
        return f"Weight({self.path or type(self.layer).__name__}.{self.parameter}, shape={self.shape})"


def _outputs(layer: nn.Module) -> int:
    for name in ("out_features", "nf", "out_channels"):
        if isinstance(getattr(layer, name, None), int):
            return cast(int, getattr(layer, name))
    raise ValueError(f"{type(layer).__name__} has no bias and no known output width, so none can be added to it")
