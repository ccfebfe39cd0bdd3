"""Keys and values in front of every attention's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.attention import Attended, Attending, AttentionCall, Compute
from deltaworks.core.method import Method, Placed
from deltaworks.core.operators.prefix import EncodedPrefix, PrefixKV
from deltaworks.core.part import Shared
from deltaworks.model.anatomy import Anatomy, Site
from tests.families import FAMILIES, tokens


def adapted(family: str, **settings: Any) -> tuple[nn.Module, dict[str, Any], dw.Tuned]:
    model, batch = FAMILIES[family]()
    return model, batch, dw.attach(model, dw.PrefixTuning(length=3, **settings), seed=0)


class Recorder(Attending):
    """Keeps what one attention was called with and what it gave."""

    def attend(self, call: AttentionCall, compute: Compute) -> Attended:
        self.call, self.result = call, compute(call)
        return self.result


class Recording(Method):
    slug, paper, family = "recording", "none", "tests"

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        yield Placed(Site("model.layers.0.self_attn", None, "attention", None), Recorder(), "recorder")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_table_gives_what_the_mlp_gave(family: str) -> None:
    model, batch, tuned = adapted(family)
    before = model(**batch).logits
    rules = tuned.run(1)
    rules.emit("attached")
    rules.emit("finished")
    assert (model(**batch).logits - before).abs().max() <= 1e-6 * before.abs().max()
    assert {type(part) for part in tuned.parts()} == {PrefixKV}
    assert all(name.endswith((".key", ".value")) for name in tuned.tensors())


def test_stored_and_trained_sizes_are_the_papers() -> None:
    model, _, tuned = adapted("gpt2", hidden=16)
    m, layers, d, b = 3, 2, 32, 16
    assert tuned.summary().trainable == m * d + d * b + b + b * layers * 2 * d + layers * 2 * d
    tuned.run(1).emit("finished")
    assert sum(tensor.numel() for tensor in tuned.tensors().values()) == m * layers * 2 * d
    assert model.config.n_embd == d


def test_a_zero_prefix_takes_its_share_of_the_attention() -> None:
    model, batch, tuned = adapted("llama", hidden=None)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.zero_()
    recorder = next(dw.attach(model, Recording(), name="recorder").parts())
    dw.activate(model, ["recorder"])
    model(**batch)
    call, base = recorder.call, recorder.result[0]
    dw.activate(model, ["recorder", "default"])
    seen: list[Tensor] = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(**batch)
    handle.remove()
    key = call.key.repeat_interleave(2, 1)
    scores = (call.query @ key.mT) * call.options["scaling"]
    causal = torch.ones(9, 9, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None]
    size = scores.masked_fill(~causal, -torch.inf).exp().sum(-1)
    kept = (size / (size + 3)).transpose(1, 2).unsqueeze(-1)
    real = batch["attention_mask"].bool()
    assert torch.allclose(seen[0].unflatten(-1, (4, 8))[real], (kept * base)[real], atol=1e-6)
    assert kept[real].max() < 0.95


def test_keys_have_the_key_heads() -> None:
    _, _, tuned = adapted("llama", hidden=None)
    assert {tuple(part.key.shape) for part in tuned.parts()} == {(2, 3, 8)}
    _, _, tuned = adapted("qwen3", hidden=None)
    assert {tuple(part.value.shape) for part in tuned.parts()} == {(2, 3, 16)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "t5", "bart"])
def test_eager_and_sdpa_agree(family: str) -> None:
    logits = []
    for implementation in ("sdpa", "eager"):
        model, batch, _ = adapted(family)
        model.set_attn_implementation(implementation)
        logits.append(model(**batch).logits[batch.get("labels", batch["input_ids"]) != -100])
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_decoding_is_uncached_decoding(family: str, beams: int) -> None:
    model, _, _ = adapted(family)
    # Decoders are padded on the left; BART's encoder counts positions from the left, so it is on the right there.
    real = slice(4) if family in ("t5", "bart") else slice(3, None)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1] = torch.zeros(7, dtype=torch.long).index_fill(0, torch.arange(7)[real], 1)
    ids = tokens(2, 7) * mask
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    made = [model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*made)
    alone = model.generate(input_ids=ids[1:, real], **options)
    assert torch.equal(made[0][1, -6:], alone[0, -6:])


def test_later_tokens_do_not_leak() -> None:
    model, batch, _ = adapted("llama")
    for mask in ({}, {"attention_mask": torch.ones(2, 9, dtype=torch.long)}):
        ids = batch["input_ids"].clone()
        before = model(input_ids=ids, **mask).logits
        ids[:, -1] = 7
        after = model(input_ids=ids, **mask).logits
        assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])


def test_padding_changes_nothing() -> None:
    model, batch, _ = adapted("llama")
    padded = model(**batch).logits[1, :6]
    alone = model(input_ids=batch["input_ids"][1:, :6]).logits[0]
    assert torch.allclose(padded, alone, atol=1e-5)


def test_no_sliding_window_hides_the_prefix() -> None:
    model, batch, tuned = adapted("gemma3", hidden=None)
    ids = batch["input_ids"][:1]
    before = model(input_ids=ids).logits
    with torch.no_grad():
        for part in tuned.parts():
            part.value.add_(1.0)
    changed = (model(input_ids=ids).logits - before).abs().amax(-1)
    assert ids.shape[1] > model.config.sliding_window and (changed > 1e-4).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_from_text_is_the_text(family: str) -> None:
    text = [11, 12, 13]
    model, batch, _ = adapted(family, hidden=None, init="text", init_ids=text, positions="shifted")
    ids = batch["input_ids"][:1]
    with dw.disable(model):
        whole = model(input_ids=torch.cat((torch.tensor([text]), ids), 1)).logits[:, 3:]
    assert torch.allclose(model(input_ids=ids).logits, whole, atol=1e-5)


def test_encoder_decoders_have_prefixes_in_all_three_attentions() -> None:
    model, _, tuned = adapted("bart")
    assert len(list(tuned.parts())) == 3 * 2
    kinds = {(name.split(".")[1], "encoder_attn" in name): part.kind for name, part in tuned.named_parts()}
    assert sorted(kinds.values()) == [0, 1, 2]
    assert model.model.encoder.layers[0].self_attn.deltaworks is not None


def test_the_configuration_is_not_touched() -> None:
    model, batch, _ = adapted("llama")
    before = model.config.to_dict(), model.config._attn_implementation
    model(**batch)
    with pytest.raises(RuntimeError):
        model(input_ids=torch.zeros(1, 3))
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert all(block.self_attn.config is model.model.config for block in model.model.layers)


def test_where_and_how_many_can_be_chosen() -> None:
    _, _, tuned = adapted("llama", on="layers.1")
    assert [name for name, _ in tuned.named_parts()] == ["model.layers.1.self_attn.prefix"]
    assert isinstance(next(tuned.parts()), EncodedPrefix)


@pytest.mark.parametrize("family", ["bloom", "falcon", "deberta_v2", "mamba", "mlp"])
def test_models_without_an_entrance_are_refused_in_one_line(family: str) -> None:
    with pytest.raises(ValueError, match=r"prefix_tuning (cannot enter|finds no attention in) .*; take ") as refusal:
        adapted(family)
    assert "\n" not in str(refusal.value)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="belong together"):
        dw.PrefixTuning(init="text")
    with pytest.raises(ValueError, match="hidden=none"):
        dw.PrefixTuning(init="text", init_ids=[3])
    with pytest.raises(ValueError, match="the encoder of T5ForConditionalGeneration"):
        adapted("t5", positions="shifted")
    model, batch, _ = adapted("llama")
    with pytest.raises(ValueError, match="batch of its own"), dw.route(model, ["default", None]):
        model(**batch)
