"""(IA)^3 and norm tuning compute what `peft` computes, on real architectures in float64: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.core.part import Part
from tests.families import FAMILIES

peft = pytest.importorskip("peft")


def compare(family: str, method: Method, config: object, theirs_at: Callable[[nn.Module, Part], nn.Parameter]) -> None:
    """Move every trained tensor of ours, copy it to theirs, and compare logits and gradients."""
    model, batch = FAMILIES[family]()
    twin, _ = FAMILIES[family]()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    tuned = dw.attach(model.double(), method)
    other = peft.get_peft_model(twin.double(), config).eval()
    generator = torch.Generator().manual_seed(0)
    pairs = []
    with torch.no_grad():
        for _, part in tuned.named_parts():
            (own,) = part.parameters()
            value = theirs_at(other, part)
            step = torch.randn(own.shape, generator=generator, dtype=torch.float64) * 0.1
            own.add_(step)
            value.add_(step.view_as(value))
            pairs.append((own, value))
    trained = sum(p.numel() for p in other.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in tuned.parameters())
    ours, theirs = model(**batch), other(**batch)
    assert torch.allclose(ours.logits, theirs.logits, rtol=0, atol=1e-10)
    ours.loss.backward()
    theirs.loss.backward()
    for own, value in pairs:
        assert own.grad is not None and value.grad is not None
        assert torch.allclose(own.grad, value.grad.view_as(own), rtol=0, atol=1e-10 + 1e-9 * value.grad.abs().max())


IA3 = {
    # A full expression, since peft matches endings of names and BERT's attention has an `output.dense` as well.
    "bert": (dw.IA3(), r".*(key|value|layer\.\d\.output\.dense)", r".*layer\.\d\.output\.dense"),
    "opt": (dw.IA3(), ["k_proj", "v_proj", "fc2"], ["fc2"]),
    "bart": (dw.IA3(), ["k_proj", "v_proj", "fc2"], ["fc2"]),
    "vit": (dw.IA3(), ["k_proj", "v_proj", "mlp.fc2"], ["mlp.fc2"]),
    # peft scales the whole of a fused projection, queries too; asked for, so do we.
    "gpt2": (dw.IA3(on=["attention.qkv", "mlp.down"]), ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
}


@pytest.mark.parametrize("family", IA3)
def test_ia3(family: str) -> None:
    method, targets, inner = IA3[family]

    def theirs_at(other: nn.Module, part: Part) -> nn.Parameter:
        return other.get_submodule(f"base_model.model.{part.site.path}").ia3_l["default"]

    config = peft.IA3Config(target_modules=targets, feedforward_modules=inner, fan_in_fan_out=family == "gpt2")
    compare(family, method, config, theirs_at)


@pytest.mark.parametrize(
    ("family", "on", "names"),
    [
        ("bert", "mlp.norm", r".*layer\.\d\.output\.LayerNorm"),
        ("gpt2", "norm", ["ln_1", "ln_2", "ln_f"]),
        (
            "bart",
            "norm",
            ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layernorm_embedding"],
        ),
    ],
)
def test_layernorm(family: str, on: str, names: object) -> None:
    def theirs_at(other: nn.Module, part: Part) -> nn.Parameter:
        norm = other.get_submodule(f"base_model.model.{part.site.path}").ln_tuning_layers["default"]
        return norm.get_parameter(part.site.parameter or "weight")

    compare(family, dw.LayerNorm(on=on), peft.LNTuningConfig(target_modules=names), theirs_at)
