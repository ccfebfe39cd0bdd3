"""Prompt and prefix tuning against HF PEFT, in float64: outputs and gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import deltaworks as dw
from tests.families import ENCODER, FAMILIES, NO_DROPOUT, tokens

LENGTH = 3


def pair(family: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    model, batch = FAMILIES[family]()
    model = model.double()
    return model, copy.deepcopy(model), batch


def theirs(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


def real(batch: dict[str, Any]) -> Tensor:
    return batch["labels"] != -100


def quietly(model: nn.Module, **inputs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bart", "t5"])
def test_prompt_tuning(family: str) -> None:
    ours, base, batch = pair(family)
    seq2seq = family in ("bart", "t5")
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM", num_virtual_tokens=LENGTH, num_transformer_submodules=1
    )
    other = theirs(base, config)
    tuned = dw.attach(ours, dw.PromptTuning(length=LENGTH))
    prompt = tuned.parameters()[0]
    their = other.prompt_encoder["default"].embedding.weight
    their.data = their.data.double()
    prompt.data.copy_(their.data)
    inputs = batch if seq2seq else {key: value for key, value in batch.items() if key != "labels"}
    mine, given = ours(**inputs).logits, quietly(other, **inputs).logits
    if not seq2seq:
        given = given[:, LENGTH:]
    mask = real(batch)
    assert torch.allclose(mine[mask], given[mask], atol=1e-9)
    mine[mask].pow(2).sum().backward()
    given[mask].pow(2).sum().backward()
    assert prompt.grad is not None and torch.allclose(prompt.grad, their.grad, rtol=1e-7, atol=1e-9)


def test_prompt_tuning_of_a_classifier_that_reads_the_first_row() -> None:
    torch.manual_seed(0)
    for kind in (hf.BertForSequenceClassification, hf.RobertaForSequenceClassification):
        ours = kind(kind.config_class(**ENCODER, **NO_DROPOUT, num_labels=3)).double().eval()
        other = theirs(copy.deepcopy(ours), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH))
        tuned = dw.attach(ours, dw.PromptTuning(length=LENGTH, readout="prompt"))
        their = other.prompt_encoder["default"].embedding.weight
        their.data = their.data.double()
        tuned.parameters()[0].data.copy_(their.data)
        inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
        mine, given = ours(**inputs).logits, quietly(other, **inputs).logits
        assert torch.allclose(mine, given, atol=1e-9)


def table(tuned: dw.Tuned, weight: Tensor, layers: list[int]) -> None:
    """Fill prefixes from PEFT's table: `length x (layer, key and value, head, head size)`."""
    parts = [part for part in tuned.parts() if hasattr(part, "key")]
    heads, _, size = parts[0].key.shape
    stacked = weight.view(LENGTH, -1, 2, heads, size).permute(1, 2, 3, 0, 4)
    for part, layer in zip(parts, layers, strict=True):
        part.key.data.copy_(stacked[layer, 0])
        part.value.data.copy_(stacked[layer, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefix_tuning_of_a_decoder(family: str, implementation: str) -> None:
    ours, base, batch = pair(family)
    for model in (ours, base):
        model.set_attn_implementation(implementation)
    other = theirs(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    tuned = dw.attach(ours, dw.PrefixTuning(length=LENGTH, hidden=None, positions="shifted"))
    their = other.prompt_encoder["default"].embedding.weight
    their.data = their.data.double()
    table(tuned, their.data, [0, 1])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    mask = real(batch)
    mine, given = ours(**inputs).logits[mask], quietly(other, **inputs).logits[mask]
    assert torch.allclose(mine, given, atol=1e-9)
    mine.pow(2).sum().backward()
    given.pow(2).sum().backward()
    grads = [torch.stack((part.key.grad, part.value.grad)) for part in tuned.parts() if hasattr(part, "key")]
    twin = torch.stack(grads)
    assert torch.allclose(twin.permute(3, 0, 1, 2, 4).reshape(LENGTH, -1), their.grad, rtol=1e-6, atol=1e-9)


def test_prefix_tuning_of_an_encoder() -> None:
    torch.manual_seed(0)
    for kind in (hf.BertForSequenceClassification, hf.RobertaForSequenceClassification):
        ours = kind(kind.config_class(**ENCODER, **NO_DROPOUT, num_labels=3)).double().eval()
        other = theirs(copy.deepcopy(ours), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH))
        tuned = dw.attach(ours, dw.PrefixTuning(length=LENGTH, hidden=None, positions="shifted"))
        their = other.prompt_encoder["default"].embedding.weight
        their.data = their.data.double()
        table(tuned, their.data, [0, 1])
        inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
        mine, given = ours(**inputs).logits, quietly(other, **inputs).logits
        assert torch.allclose(mine, given, atol=1e-9)


def test_prefix_tuning_of_an_encoder_decoder() -> None:
    # PEFT stores a table for every layer and then gives layer i the one of layer 2 i, counted round and round.
    ours, base, batch = pair("bart")
    other = theirs(base, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH))
    tuned = dw.attach(
        ours, dw.PrefixTuning(length=LENGTH, hidden=None, positions="shifted", on=r"decoder.layers.\d+.self_attn")
    )
    their = other.prompt_encoder["default"].embedding.weight
    their.data = their.data.double()
    table(tuned, their.data, [0, 0])
    mine, given = ours(**batch).logits, quietly(other, **batch).logits
    assert torch.allclose(mine, given, atol=1e-9)


def test_the_mlp_is_theirs() -> None:
    ours, base, batch = pair("llama")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=20, token_dim=16,
        num_attention_heads=2, num_layers=2,
    )  # fmt: skip
    other = theirs(base, config)
    encoder = other.prompt_encoder["default"].double()
    tuned = dw.attach(ours, dw.PrefixTuning(length=LENGTH, hidden=20, positions="shifted"))
    shared = tuned.state.adapters["default"].shared["encoder"]
    # Their embeddings are as wide as a layer's keys, ours as the model: their sum over the first half is the same.
    shared.embedding.data = torch.cat((encoder.embedding.weight.data[None], torch.zeros(1, LENGTH, 16).double()), -1)
    shared.down[0].weight.data[:, :16] = encoder.transform[0].weight.data
    shared.down[0].bias.data.copy_(encoder.transform[0].bias.data)
    for index, part in enumerate(part for part in tuned.parts() if hasattr(part, "up")):
        part.up.weight.data.copy_(encoder.transform[2].weight.data[32 * index : 32 * index + 32])
        part.up.bias.data.copy_(encoder.transform[2].bias.data[32 * index : 32 * index + 32])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    mask = real(batch)
    assert torch.allclose(ours(**inputs).logits[mask], quietly(other, **inputs).logits[mask], atol=1e-9)
