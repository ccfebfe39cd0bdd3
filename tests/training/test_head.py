"""The loss without logits is the model's own loss."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import cross_entropy

import deltaworks as dw
from deltaworks.training import head as module
from deltaworks.training.head import causal_loss, head_of, next_token_loss, shifts
from tests.families import FAMILIES

DECODERS = ("llama", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3", "mamba", "phi3", "bloom", "falcon")


@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradients_are_those_of_the_model(family: str) -> None:
    model, batch = FAMILIES[family]()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :3] = -100
    tuned = dw.attach(model, dw.LoRA(rank=2), seed=0)
    head = head_of(model)
    assert head is not None
    own = model(**batch).loss
    own.backward()
    expected = [p.grad.clone() for p in tuned.parameters()]
    model.zero_grad()
    lean = next_token_loss(model, head, batch)
    lean.backward()
    assert torch.allclose(lean, own, rtol=1e-5)
    for parameter, wanted in zip(tuned.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, wanted, rtol=1e-4, atol=1e-7)
    assert "forward" not in head.__dict__


def test_chunks_do_not_matter(monkeypatch) -> None:
    model, batch = FAMILIES["llama"]()
    dw.attach(model, dw.LoRA(rank=2), seed=0)
    whole = next_token_loss(model, head_of(model), batch)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 64 * 3)
    monkeypatch.setattr(module, "ROWS", 2)
    assert torch.allclose(next_token_loss(model, head_of(model), batch), whole, rtol=1e-6)


def test_nothing_as_wide_as_the_vocabulary_is_kept() -> None:
    model, batch = FAMILIES["llama"]()
    dw.attach(model, dw.LoRA(rank=2), seed=0)
    vocabulary, kept = model.config.vocab_size, []
    own = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model, head_of(model), batch)
    assert kept and not [shape for shape in kept if shape and shape[-1] == vocabulary]


def test_a_head_that_is_trained_changed_or_followed_by_more_is_left_to_the_model() -> None:
    model, _ = FAMILIES["llama"]()
    assert head_of(model) is None, "the head of an unfrozen model trains"
    with torch.no_grad():
        assert head_of(model) is not None, "where nothing trains, neither does the head"
    dw.attach(model, dw.LoRA(rank=2, on=["lm_head"]))
    assert head_of(model) is None
    dw.detach(model)
    dw.attach(model, dw.LoRA(rank=2), also="head")
    assert head_of(model) is None
    dw.detach(model)
    dw.attach(model, dw.LoRA(rank=2))
    model.config.final_logit_softcapping = 30.0
    assert head_of(model) is None
    t5, _ = FAMILIES["t5"]()
    dw.attach(t5, dw.LoRA(rank=2))
    assert head_of(t5) is None


def test_a_batch_without_targets_has_loss_zero() -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.LoRA(rank=2))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = next_token_loss(model, head_of(model), batch)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in tuned.parameters())


def bart_decoder() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    ids = torch.randint(4, 64, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    return hf.BartForCausalLM(config).train(), {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("items", [None, 40])
def test_a_decoder_whose_own_loss_does_not_look_ahead_learns_the_next_token_all_the_same(head: str, items) -> None:
    model, batch = bart_decoder()
    tuned = dw.attach(model, dw.LoRA(rank=2, on="attention"), also="head" if head == "trained" else None, seed=0)
    assert (head_of(model) is None) == (head == "trained") and not shifts(model)
    assert model.training
    logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
    count = int((labels[:, 1:] != -100).sum()) if items is None else items
    wanted = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count
    expected = torch.autograd.grad(wanted, tuned.parameters())
    loss = causal_loss(model, batch, items)
    assert loss is not None
    torch.testing.assert_close(loss, wanted)
    assert not torch.allclose(loss, model(**batch).loss), "its own compares with what was read"
    for found, gradient in zip(torch.autograd.grad(loss, tuned.parameters()), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", DECODERS)
def test_a_model_that_looks_ahead_is_asked_where_its_head_trains(family: str) -> None:
    model, batch = FAMILIES[family]()
    assert shifts(model) and module._asked(model)
    assert causal_loss(model, batch) is None
