"""Changes of biases, of parts of fused weights, and of layers that add to their neighbours' outputs in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from tests.families import FAMILIES


@torch.no_grad()
def nudge(tuned: dw.Tuned, seed: int = 0) -> dw.Tuned:
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    return tuned


@pytest.mark.parametrize("method", [dw.LoRA(rank=2), dw.LoRA(rank=2, dropout=0.1), dw.IA3(), dw.BitFit()])
def test_a_model_may_add_to_an_adapted_layers_output_in_place(method) -> None:
    model, batch = FAMILIES["falcon_new"]()
    tuned = nudge(dw.attach(model.train(), method))
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters())


@pytest.mark.parametrize("family", ["mamba", "bert", "phi3", "gpt2"])
def test_biases_and_weights_of_one_layer_stack_switch_and_merge(family: str) -> None:
    model, batch = FAMILIES[family]()
    base = model(**batch).logits
    nudge(dw.attach(model, dw.BitFit(), name="biases"), 1)
    alone = model(**batch).logits
    nudge(dw.attach(model, dw.LoRA(rank=2), name="weights"), 2)
    both = model(**batch).logits
    dw.merge(model)
    assert torch.allclose(model(**batch).logits, both, atol=1e-5)
    dw.unmerge(model)
    dw.activate(model, "biases")
    assert torch.equal(model(**batch).logits, alone)
    dw.detach(model, "biases")
    dw.activate(model, "weights")
    weights = model(**batch).logits
    assert not torch.allclose(weights, both, atol=1e-4) and not torch.allclose(weights, base, atol=1e-4)
    dw.detach(model)
    assert torch.equal(model(**batch).logits, base)


def test_a_bias_change_keeps_the_dtype_and_the_absence_of_the_base() -> None:
    model, batch = FAMILIES["llama"]()
    model.bfloat16()
    nudge(dw.attach(model, dw.BitFit()))
    assert model(**batch).logits.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.bias is None
    dw.merge(model)
    assert model.model.layers[0].mlp.up_proj.bias.dtype == torch.bfloat16


def test_a_part_that_reads_at_a_module_without_parameters_follows_the_model() -> None:
    model, _ = FAMILIES["bert"]()
    tuned = dw.attach(model.double(), dw.Houlsby(size=4))
    assert any(isinstance(model.get_submodule(part.site.path), nn.Dropout) for part in tuned.parts())
    assert all(p.dtype == torch.float64 for p in tuned.parameters())


def test_scales_of_two_parts_of_one_projection_meet_only_their_own_rows() -> None:
    model, batch = FAMILIES["bloom"]()
    layer = model.transformer.h[0].self_attention.query_key_value
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    model(**batch)
    tuned = dw.attach(model, dw.IA3(on=["attention.key", "attention.value"]))
    factors = torch.ones(seen[0].shape[-1])
    for number, part in enumerate(tuned.parts()):
        if part.site.path.startswith("transformer.h.0."):
            with torch.no_grad():
                part.l.fill_(2.0 + number)
            factors[list(part.site.rows)] = 2.0 + number
    model(**batch)
    assert sorted(factors.unique().tolist()) == [1.0, 2.0, 3.0]
    assert torch.allclose(seen[1], seen[0] * factors, atol=1e-6)


@pytest.mark.parametrize("slug", ["bitfit", "fourierft", "ia3", "lora_plus", "vb_lora"])
def test_what_trains_of_the_base_has_the_runs_rate_and_decay(slug: str) -> None:
    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.method(slug), also="norm.final", seed=0)
    groups = {name: group for group in tuned.parameter_groups(0.5, weight_decay=0.25) for name in group["names"]}
    own = groups.pop("model.norm.weight")
    assert (own["lr"], own["weight_decay"]) == (0.5, 0.25)
    assert any((group["lr"], group["weight_decay"]) != (0.5, 0.25) for group in groups.values())
