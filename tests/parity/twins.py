"""One small network twice, adapted by us and by `peft`, with equal tensors: outputs and gradients must be equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.method import Method
from tests.methods.toys import Net, net

Translation = Callable[[Any], dict[str, Tensor]]


def twins(method: Method, config: peft.PeftConfig, translate: Translation) -> tuple[Net, dw.Tuned, nn.Module]:
    """Our network and theirs; every trained tensor of theirs is moved off its start and copied to ours.

    Args:
        method: ours, on every linear layer.
        config: theirs, with `target_modules` first and second.
        translate: their adapted layer's parameters under our names.
    """
    (ours, _), (base, _) = net(), net()
    tuned = dw.attach(ours, method, seed=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        theirs = peft.get_peft_model(base, config).double()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.3)
        for name, part in tuned.named_parts():
            for own, value in translate(layer(theirs, name)).items():
                part.get_parameter(own).copy_(value)
    return ours, tuned, theirs


def layer(theirs: nn.Module, name: str) -> Any:
    """Their layer at the place of one of our parts."""
    return theirs.get_submodule(f"base_model.model.{name.split('.')[0]}")


def assert_equal(
    ours: Net, tuned: dw.Tuned, theirs: nn.Module, translate: Translation, tolerance: float = 1e-10
) -> None:
    """Outputs, the input's gradient, and the gradient of every tensor that trains with us."""
    inputs = [net()[1].requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((ours, theirs), inputs, strict=True)]
    g = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2)).double()
    close(outputs[0], outputs[1], tolerance)
    for y in outputs:
        y.backward(g)
    close(inputs[0].grad, inputs[1].grad, tolerance)
    for name, part in tuned.named_parts():
        for own, value in translate(layer(theirs, name)).items():
            if part.get_parameter(own).requires_grad:
                close(part.get_parameter(own).grad, translated_gradient(value), tolerance)


def translated_gradient(value: Tensor) -> Tensor:
    """The gradient of a parameter, or of a view of one."""
    base = value if value.is_leaf else value._base
    assert base is not None and base.grad is not None
    return base.grad.as_strided(value.shape, value.stride(), value.storage_offset())


def close(a: Tensor | None, b: Tensor | None, tolerance: float) -> None:
    assert a is not None and b is not None and b.abs().max() > 0
    assert (a - b).abs().max() <= tolerance * b.abs().max()
