"""QLoRA is LoRA in the paper's settings, and says so when the base is not quantised."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deltaworks as dw
from deltaworks.model.loading import load_base
from deltaworks.model.weights import Weight
from tests.families import FAMILIES


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


def test_the_base_takes_the_papers_bits_and_its_error_is_within_the_code(tmp_path) -> None:
    """4 bits, 8 for every 64 weights, 32 for every 256 of these: 4.127 a weight (tables and the offset aside)."""
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        vocab_size=8, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(tmp_path)
    weight = load_base(tmp_path, quantize="nf4").model.layers[0].mlp.up_proj.weight
    state = weight.quant_state
    assert state.absmax.dtype == torch.uint8 and state.state2.absmax.dtype == torch.float32
    bits = 8 * (weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes) / (256 * 512)
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)
    # Half the widest gap of the code, times the largest of a block; one hundredth for the constants' own rounding.
    dense = whole.model.layers[0].mlp.up_proj.weight.detach()
    found = Weight(load_base(tmp_path, quantize="nf4").model.layers[0].mlp.up_proj).dense()
    largest = dense.view(-1, 64).abs().amax(1, keepdim=True)
    assert ((found - dense).view(-1, 64).abs() <= (0.152 + 0.01) * largest).all()
