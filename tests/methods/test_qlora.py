"""QLoRA is LoRA in the paper's settings, and says so when the base is not quantised."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import deltaworks as dw
from deltaworks.model.loading import load_base
from deltaworks.model.weights import Weight
from tests.families import FAMILIES
from tests.methods.toys import nudge

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
TOKENS = torch.arange(8).view(1, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    """A Llama of one block, also on disk; a fifth of its feed-forward part is zero, and a whole row of `down_proj`."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    whole, folder = LlamaForCausalLM(config), tmp_path_factory.mktemp("base")
    with torch.no_grad():
        for path in (UP, DOWN):
            whole.get_submodule(path).weight.view(-1)[::5] = 0
        whole.get_submodule(DOWN).weight[0] = 0
    whole.save_pretrained(folder)
    return whole, folder


def blocks(model: torch.nn.Module, path: str) -> torch.Tensor:
    """A layer's values, dequantised, in the blocks of 64 that share a constant."""
    return Weight(model.get_submodule(path)).dense().reshape(-1, 64)


def test_it_warns_beside_full_weights_and_is_lora() -> None:
    model, batch = FAMILIES["llama"]()
    with pytest.warns(UserWarning, match="--quantize nf4"):
        ours = dw.attach(model, dw.QLoRA(), seed=0).tensors()
    twin, _ = FAMILIES["llama"]()
    lora = dw.attach(twin, dw.LoRA(rank=64, dropout=0.1), seed=0)
    assert all(torch.equal(value, lora.tensors()[name]) for name, value in ours.items())
    assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_it_is_silent_beside_four_bits(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    FAMILIES["llama"]()[0].save_pretrained(tmp_path)
    model = load_base(tmp_path, quantize="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = dw.attach(model, dw.QLoRA(), seed=0)
    assert next(tuned.parts()).rank == 64


def test_the_base_takes_the_papers_bits_and_its_error_is_within_the_code(saved) -> None:
    """4 bits, 8 for every 64 weights, 32 for every 256 of these: 4.127 a weight (tables and the offset aside)."""
    whole, folder = saved
    model = load_base(folder, quantize="nf4")
    weight = model.get_submodule(UP).weight
    state = weight.quant_state
    assert state.absmax.dtype == torch.uint8 and state.state2.absmax.dtype == torch.float32
    bits = 8 * (weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes) / (256 * 512)
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)
    # Half the widest gap of the code, times the largest of a block; one hundredth for the constants' own rounding.
    dense, found = blocks(whole, UP), blocks(model, UP)
    largest = dense.abs().amax(1, keepdim=True)
    assert ((found - dense).abs() <= (0.152 + 0.01) * largest).all()


def test_rounding_the_constants_moves_them_by_less_than_a_hundredth_and_zeros_not_at_all(saved) -> None:
    whole, folder = saved
    model = load_base(folder, quantize="nf4")
    moved = (blocks(model, UP).abs().amax(1) / blocks(whole, UP).abs().amax(1) - 1).abs().max()
    assert 0 < moved < 0.01
    assert all((blocks(model, path)[blocks(whole, path) == 0] == 0).all() for path in (UP, DOWN))


def test_with_exact_constants_zeros_and_every_blocks_largest_are_exact_and_the_rest_within_half_a_gap(saved) -> None:
    whole, folder = saved
    once = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=once)
    for path in (UP, DOWN):
        dense, found = blocks(whole, path), blocks(model, path)
        assert (found[dense == 0] == 0).all()
        largest = dense.abs().argmax(1, keepdim=True)
        assert torch.equal(found.gather(1, largest), dense.gather(1, largest))
        assert ((found - dense).abs() <= 0.152 * dense.gather(1, largest).abs()).all()


def test_training_changes_no_bit_of_the_base(saved) -> None:
    model = load_base(saved[1], quantize="nf4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert before[f"{UP}.weight"].dtype == torch.uint8
    tuned = dw.attach(model, dw.QLoRA(rank=4), seed=0)
    start = [parameter.detach().clone() for parameter in tuned.parameters()]
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2, weight_decay=0.1))
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert not any(torch.equal(now, was) for now, was in zip(tuned.parameters(), start, strict=True))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_output_and_the_inputs_gradient_are_those_of_a_layer_that_holds_the_dequantised_weight(saved) -> None:
    model = load_base(saved[1], quantize="nf4")
    tuned = dw.attach(model, dw.QLoRA(rank=4), seed=0)
    for trained in (False, True):
        if trained:
            nudge(tuned)
        for part in tuned.parts():
            layer = model.get_submodule(part.site.path)
            dense = Weight(layer).dense() + part.dense().detach()
            x = torch.randn(2, 5, dense.shape[1], requires_grad=True)
            y = layer(x)
            g = torch.randn_like(y)
            (found,) = torch.autograd.grad(y, x, g)
            assert torch.allclose(y, x @ dense.T, rtol=1e-4, atol=1e-4)
            assert torch.allclose(found, g @ dense, rtol=1e-4, atol=1e-4)


def test_it_computes_what_peft_computes_on_the_same_base(saved) -> None:
    peft = pytest.importorskip("peft")
    model, twin = (load_base(saved[1], quantize="nf4") for _ in range(2))
    tuned = dw.attach(model, dw.QLoRA(rank=4), seed=0)
    nudge(tuned)
    places = [part.site.path for part in tuned.parts()]
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_alpha=16, target_modules=places)).eval()
    layers = [theirs.get_submodule(f"base_model.model.{path}") for path in places]
    assert {type(layer).__module__ for layer in layers} == {"peft.tuners.lora.bnb"}
    pairs = []
    for part, layer in zip(tuned.parts(), layers, strict=True):
        pairs += [(part.a, layer.lora_A["default"].weight), (part.b, layer.lora_B["default"].weight)]
    with torch.no_grad():
        for own, other in pairs:
            other.copy_(own)
    results = [one(TOKENS, labels=TOKENS) for one in (model, theirs)]
    assert torch.allclose(results[0].logits, results[1].logits, rtol=1e-5, atol=1e-5)
    for result in results:
        result.loss.backward()
    for own, other in pairs:
        assert (own.grad - other.grad).norm() < 1e-5 * other.grad.norm()
