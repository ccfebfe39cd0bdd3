"""What the conformance suite runs every registered method on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.method import Method
from tests.families import FAMILIES

METHODS = list(dw.methods())
# One of every kind of base; a decoder first, on which every method must work.
KINDS = ("llama", "gpt2", "bert", "t5", "vit", "mixtral", "mamba")


def build(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model and a batch, in a dtype."""
    model, batch = FAMILIES[family]()
    model = model.to(dtype)
    return model, {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def batches(family: str, dtype: torch.dtype = torch.float32, count: int = 2) -> list[dict[str, Any]]:
    """A few batches for methods that need data."""
    _, batch = build(family, dtype)
    made = [batch]
    for shift in range(1, count):
        made.append({k: v.roll(shift, 0) if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in batch.items()})
    return made


def settings(slug: str) -> Method:
    """The method with its defaults."""
    return dw.method(slug)


def attach(
    model: nn.Module, slug: str, family: str, name: str = "default", dtype: torch.dtype = torch.float32
) -> dw.Tuned:
    """Attach with defaults; methods that need data get it."""
    method = settings(slug)
    data = batches(family, dtype) if method.needs_data else None
    return dw.attach(model, method, name=name, data=data, seed=0)


def adapted(slug: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict, dw.Tuned]:
    """A model with the method attached and its trained tensors moved off their start."""
    model, batch = build(family, dtype)
    tuned = attach(model, slug, family, dtype=dtype)
    nudge(tuned)
    return model, batch, tuned


@torch.no_grad()
def nudge(tuned: dw.Tuned, seed: int = 1, size: float = 0.02) -> None:
    """Move every trained tensor a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)


def output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's main output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model(**batch)
    for name in ("logits", "last_hidden_state", "logits_per_text"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    return result[0] if isinstance(result, tuple) else result


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """A scalar that depends on the whole output."""
    value = output(model, batch)
    return (value if value.dtype == torch.float64 else value.float()).pow(2).mean()


def base_names(model: nn.Module) -> Iterator[str]:
    """State-dict names that are the base's own."""
    return (name for name in model.state_dict() if "deltaworks" not in name.split("."))
