"""GLoRA without a search computes what `peft` computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from tests.methods.toys import net

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("ab", "c", "de"),
    [
        ("lora", "lora", "vector"),
        ("vector", "vector", "constant"),
        ("constant", "none", "vector"),
        ("none", "lora", "none"),
    ],
)
def test_outputs_and_gradients(ab: str, c: str, de: str) -> None:
    (ours, x), (base, _) = net(), net()
    tuned = dw.attach(ours, dw.GLoRA(on=nn.Linear, rank=3, a=ab, b=ab, c=c, d=de, e=de), seed=0)
    config = peft.GloraConfig(r=3, target_modules=["first", "second"], config_A_B=ab, config_C=c, config_D_E=de)
    theirs = peft.get_peft_model(base, config).double()
    pairs = []
    with torch.no_grad():
        for name, part in tuned.named_parts():
            layer = theirs.get_submodule(f"base_model.model.{name.split('.')[0]}")
            for own, parameter in part.named_parameters():
                path = getattr(layer, f"glora_{own[0].upper()}")["default"]
                other = path.get_parameter({"d": "Xd", "u": "Xu"}[own[1]] if hasattr(path, "Xd") else "X")
                other.copy_(torch.randn(other.shape, generator=torch.Generator().manual_seed(len(pairs))) * 0.3)
                parameter.copy_(other.view_as(parameter))
                pairs.append((parameter, other))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    outputs = ours(x), theirs(x)
    assert torch.allclose(*outputs, rtol=0, atol=1e-10)
    for y in outputs:
        y.square().sum().backward()
    for mine, other in pairs:
        assert other.grad is not None and torch.allclose(mine.grad, other.grad.view_as(mine), rtol=1e-9, atol=1e-10)
