"""What kind of thing a module is, told by its class's ancestry and the shapes of its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

ATTENTION = re.compile(r"attention|attn", re.I)
GRAFT = "deltaworks"
"""The name of the child that holds whatever this library has attached to a module; no part of the base's anatomy."""


def is_linear(module: nn.Module) -> bool:
    """A dense layer `x W^T + b`: `nn.Linear`, its subclasses (quantised ones among them) and GPT-2's `Conv1D`."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    # Quantised layers that are no subclass of Linear still say how wide they are and hold no other layers.
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and not any(module.children())


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(fan_out, fan_in)` of a linear layer, whatever the layout and packing of its storage."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


def is_depthwise(module: nn.Module) -> bool:
    """A convolution that sees each channel by itself."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, EMBEDDINGS)


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer: torch's own, or a leaf called a norm whose parameters, if any, are vectors."""
    if isinstance(module, NORMS):
        return True
    if any(module.children()) or "norm" not in type(module).__name__.lower():
        return False
    return all(parameter.ndim <= 1 for parameter in module.parameters(recurse=False))


def own(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters by name, those of its children not among them."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def has_statistics(module: nn.Module) -> bool:
    """A norm that keeps running statistics of what it reads: a batch norm, or an instance norm that tracks."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def experts_shapes(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The 3-D parameters (experts first) of a module that holds its experts fused; empty for any other module."""
    if is_conv(module) or is_linear(module) or isinstance(module, ParametrizationList):
        return {}
    if ATTENTION.search(type(module).__name__):  # XLNet's projections are 3-D too: one matrix for each head
        return {}
    shapes = {name: tuple(value.shape) for name, value in own(module).items() if value.ndim == 3}
    return {name: shape for name, shape in shapes.items() if shape[0] > 1 and min(shape) > 1}  # type: ignore[misc]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without what this library has attached and without the insides of leaves."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        if is_linear(module) or is_conv(module) or is_embedding(module) or is_norm(module):
            return
        for name, child in module.named_children():
            if name != GRAFT:
                yield from walk(f"{path}.{name}" if path else name, child)

    yield from walk("", model)
