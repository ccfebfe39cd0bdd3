"""Trained rows in front of the embedded text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.operators.soft_prompt import SoftPrompt
from tests.families import DECODER, ENCODER, FAMILIES, NO_DROPOUT, tokens

TEXT = [11, 12, 13]
DECODERS = ["llama", "gemma3", "gpt2", "opt", "bloom", "falcon", "mamba"]


def adapted(family: str, **settings: Any) -> tuple[nn.Module, dict[str, Any], dw.Tuned]:
    model, batch = FAMILIES[family]()
    return model, batch, dw.attach(model, dw.PromptTuning(**{"length": 3} | settings), seed=0)


def with_text(family: str) -> tuple[nn.Module, dict[str, Any], dw.Tuned]:
    """A model whose prompt is the embedding of real tokens."""
    return adapted(family, init="text", init_ids=TEXT)


def preceded(ids: Tensor, text: list[int] = TEXT) -> Tensor:
    return torch.cat((torch.tensor([text]).expand(len(ids), -1), ids), 1)


def test_no_rows_change_nothing() -> None:
    for family in ("llama", "bert", "t5"):
        model, batch, tuned = adapted(family)
        part = next(tuned.parts())
        assert isinstance(part, SoftPrompt)
        part.prompt = nn.Parameter(part.prompt[:0])
        for other in list(tuned.parts())[1:]:
            other.length = 0
        real = batch["labels"] != -100
        logits = model(**batch).logits[real]
        with dw.disable(model):
            assert torch.allclose(model(**batch).logits[real], logits, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bart"])
def test_text_rows_are_what_the_embedding_module_gives(family: str) -> None:
    model, _, tuned = adapted(family, length=5, init="text", init_ids=TEXT)
    given = model.get_input_embeddings()(torch.tensor([*TEXT, *TEXT[:2]]))
    assert torch.equal(next(tuned.parts()).prompt, given)


@pytest.mark.parametrize("family", [*DECODERS, "bert", "deberta_v2", "modernbert"])
def test_a_prompt_of_real_tokens_is_real_tokens(family: str) -> None:
    model, batch, _ = with_text(family)
    ids = batch["input_ids"][:1]
    logits = model(input_ids=ids).logits
    with dw.disable(model):
        whole = model(input_ids=preceded(ids)).logits
    assert logits.shape[1] == ids.shape[1]
    assert torch.allclose(logits, whole[:, 3:], atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_of_an_encoder_decoder_the_encoder_reads_it(family: str) -> None:
    model, batch, _ = with_text(family)
    mask = torch.cat((torch.ones(2, 3, dtype=torch.long), batch["attention_mask"]), 1)
    result = model(**batch)
    with dw.disable(model):
        whole = model(input_ids=preceded(batch["input_ids"]), attention_mask=mask, labels=batch["labels"])
    assert torch.allclose(result.logits, whole.logits, atol=1e-5) and torch.allclose(result.loss, whole.loss)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_continues_the_prompted_text(family: str, beams: int) -> None:
    model, _, _ = with_text(family)
    real = slice(4) if family == "t5" else slice(3, None)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1] = torch.zeros(7, dtype=torch.long).index_fill(0, torch.arange(7)[real], 1)
    ids = tokens(2, 7) * mask
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    made = [model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*made)
    with dw.disable(model):
        for row, alone in ((0, ids[:1]), (1, ids[1:, real])):
            whole = model.generate(input_ids=preceded(alone), **options)
            assert torch.equal(made[0][row, -5:], whole[0, -5:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_padding_on_the_right_changes_nothing(family: str) -> None:
    model, batch, _ = adapted(family)
    if family == "t5":
        padded = model(**batch).logits[1]
        alone = model(input_ids=batch["input_ids"][1:, :6], labels=batch["labels"][1:]).logits[0]
    else:
        padded = model(**batch).logits[1, :6]
        alone = model(input_ids=batch["input_ids"][1:, :6]).logits[0]
    assert torch.allclose(padded, alone, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_padding_on_the_left_does_not_come_between_prompt_and_text(family: str) -> None:
    model, batch, _ = adapted(family)
    ids, mask = batch["input_ids"][:1, :6], torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    padded = model(input_ids=torch.cat((ids.new_zeros(1, 3), ids), 1), attention_mask=mask).logits[:, 3:]
    assert torch.allclose(padded, model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5", "bert_classification"])
def test_only_the_prompt_has_a_gradient(family: str) -> None:
    model, batch, tuned = adapted(family)
    model(**batch).loss.backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(reached) == 1 and reached[0].endswith(".prompt.prompt")
    assert tuned.parameters()[0].numel() == 3 * 32


def test_classifiers_read_the_text() -> None:
    torch.manual_seed(0)
    decoder = hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER, num_labels=3)).eval()
    encoder = hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, **NO_DROPOUT, num_labels=3)).eval()
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    ids[1, 4:], mask[1, 4:] = 0, 0
    for model in (decoder, encoder):
        dw.attach(model, dw.PromptTuning(length=3, init="text", init_ids=TEXT))
        logits = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2])).logits
        backbone = model.base_model
        assert logits.shape == (2, 3)
        with dw.disable(model):
            for row, length in ((0, 6), (1, 4)):
                whole = backbone(input_ids=preceded(ids[row : row + 1, :length])).last_hidden_state
                if model is decoder:
                    expected = model.score(whole[:, -1])
                else:
                    expected = model.classifier(backbone.pooler(whole[:, 3:]))
                assert torch.allclose(logits[row], expected[0], atol=1e-5)


def test_hidden_states_are_those_of_the_text() -> None:
    model, batch, _ = adapted("llama")
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert {tuple(h.shape) for h in hidden} == {(2, 9, 32)}


def test_starts() -> None:
    rows = {init: next(adapted("llama", length=50, init=init)[2].parts()).prompt for init in ("uniform", "vocabulary")}
    assert rows["uniform"].abs().max() <= 0.5 and rows["uniform"].std() > 0.25
    model, _, tuned = adapted("llama", length=4, init="labels", init_ids=[[7], [8, 9], 10])
    embedding = model.get_input_embeddings()
    first, second, _, fourth = next(tuned.parts()).prompt
    assert torch.equal(first, embedding.weight[7]) and torch.equal(first, fourth)
    assert torch.allclose(second, embedding.weight[[8, 9]].mean(0))
    assert all((embedding.weight == row).all(1).any() for row in rows["vocabulary"])


def test_what_cannot_be_is_refused_in_one_line() -> None:
    model, batch, _ = adapted("llama")
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match="begin anew within a row"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2))
    with pytest.raises(ValueError, match=r"batch x tokens, not \[2, 1, 9, 9\]"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="take the default cache"):
        model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="take init_ids"):
        dw.PromptTuning(init="labels")
    with pytest.raises(ValueError, match="vocabulary of 64"):
        adapted("llama", init="text", init_ids=[64])
    with pytest.raises(ValueError, match="readout='prompt' is for encoders"):
        adapted("llama", readout="prompt")
    for family in ("vit", "whisper", "clip", "cnn"):
        with pytest.raises(ValueError, match="takes inputs_embeds; take prefix_tuning or lora"):
            adapted(family)
