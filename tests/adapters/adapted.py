"""What the tests of saved adapters share: adapted models, moved away from their start, and their exact state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.method import Method
from tests.families import FAMILIES


def adapted(family: str, method: Method, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model with an adapter whose values are not those of the start, and a batch for it."""
    model, batch = FAMILIES[family]()
    tuned = dw.attach(model, method, seed=0, **kwargs)
    move(tuned.parameters())
    return model, batch


@torch.no_grad()
def move(parameters: list[nn.Parameter] | list[Tensor], size: float = 0.1) -> None:
    """Add noise, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a failed load must leave alone."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: value.requires_grad for name, value in model.named_parameters()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "attached": "_deltaworks" in model.__dict__,
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is as it was, bit for bit."""
    after = state(model)
    assert {key: after[key] for key in ("flags", "types", "attached")} == {
        k: before[k] for k in ("flags", "types", "attached")
    }
    assert all(torch.equal(value, before["values"][name]) for name, value in after["values"].items())


def refused(model: nn.Module, folder: Path, load: Callable[..., Any] | None = None) -> str:
    """Loading fails with one clear line that names something in the folder, and the model is as it was."""
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, OSError)) as caught:
            (load or dw.load)(model, folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and len(message) < 1000, message
    assert_same(model, before)
    return message
