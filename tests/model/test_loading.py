"""Opening bases: what works, and what is said where it does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as hf

from deltaworks.model.anatomy import describe
from deltaworks.model.loading import load_base, load_meta, load_processor, load_tokenizer
from deltaworks.model.weights import Weight, is_quantised
from tests.families import DECODER, FAMILIES, tokens

needs = {
    "int8": pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed"),
    "int4": pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed"),
    "nf4": pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for name in ("llama", "gpt2", "bert", "wide"):
        folder = tmp_path_factory.mktemp(name)
        (wide() if name == "wide" else FAMILIES[name]()[0]).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def wide() -> hf.LlamaForCausalLM:
    """A base wide enough for the quantisers' blocks; bitsandbytes' are inexact on matrices of a thousand numbers."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**DECODER | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1})
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_saved_base_comes_back_in_eval_mode(saved: dict[str, str]) -> None:
    model, batch = FAMILIES["llama"]()
    loaded = load_base(saved["llama"])
    assert not loaded.training
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert describe(loaded).head_new == []


def test_the_dtype_is_the_one_asked_for(saved: dict[str, str]) -> None:
    assert load_base(saved["llama"], dtype="bfloat16").dtype == torch.bfloat16
    assert load_base(saved["llama"]).dtype == torch.float32


def test_heads_of_tasks(saved: dict[str, str]) -> None:
    classifier = load_base(saved["bert"], "sequence-classification", num_labels=5)
    assert classifier.classifier.out_features == 5
    assert describe(classifier).head_new == ["classifier", "bert.pooler.dense"]  # the saved base has no pooler
    tagger = load_base(saved["bert"], "token-classification", id2label={0: "no", 1: "yes"})
    assert tagger.config.label2id == {"no": 0, "yes": 1}
    scorer = load_base(saved["llama"], "regression")
    assert (scorer.config.problem_type, scorer.score.out_features) == ("regression", 1)


def test_a_base_without_weights_has_the_same_anatomy(saved: dict[str, str]) -> None:
    shape = load_meta(saved["gpt2"])
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert describe(shape).sites == describe(load_base(saved["gpt2"])).sites
    assert describe(shape).tied


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=mark) for kind, mark in needs.items()])
def test_quantised_bases_run_pass_gradients_and_keep_their_anatomy(saved: dict[str, str], kind: str) -> None:
    model = wide()
    loaded = load_base(saved["wide"], quantize=kind)
    anatomy = describe(loaded)
    assert anatomy.sites == describe(model).sites
    inside = {site.path for site in anatomy.select("all")}
    for site in anatomy.sites:
        if site.kind == "linear":
            assert is_quantised(loaded.get_submodule(site.path).weight) == (site.path in inside), site.path
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    loaded(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0

    layer = "model.layers.0.mlp.down_proj"
    original = model.get_submodule(layer).weight.detach()
    error = (Weight(loaded.get_submodule(layer)).matrix() - original).norm() / original.norm()
    assert 0 < error < {"int8": 0.01, "int4": 0.15, "nf4": 0.11}[kind]  # a mistaken layout would give one and more


@needs["nf4"]
def test_a_new_head_stays_as_it_is_when_the_base_is_quantised(saved: dict[str, str]) -> None:
    model = load_base(saved["bert"], "sequence-classification", num_labels=3, quantize="nf4")
    assert not is_quantised(model.classifier.weight) and not is_quantised(model.bert.pooler.dense.weight)
    assert is_quantised(model.bert.encoder.layer[0].attention.self.query.weight)


@needs["int8"]
def test_quantisation_that_finds_nothing_to_do_is_an_error(saved: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="found no layer to quantise in GPT2LMHeadModel; --quantize nf4"):
        load_base(saved["gpt2"], quantize="int8")


def test_a_missing_package_is_named_with_its_remedy(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else find(name, *a))
    with pytest.raises(ImportError, match=r'needs torchao.*pip install "deltaworks\[quantize\]"'):
        load_base(saved["llama"], quantize="int8")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nobody/nothing", {}, "no model 'nobody/nothing'.*offline"),
        ("/no/such/folder", {}, "/no/such/folder: there is no such folder"),
        ("./nothing", {}, "there is no such folder"),
        ("llama", {"task": "poetry"}, "task 'poetry' is unknown; there is causal-lm"),
        ("llama", {"task": "seq2seq"}, r"\(LlamaConfig\) has no form for the task 'seq2seq'"),
        ("llama", {"dtype": "int7"}, "dtype 'int7' is unknown"),
        ("llama", {"quantize": "int3"}, "there is int8, int4, nf4"),
        ("llama", {"task": "token-classification", "num_labels": 3, "id2label": {0: "a"}}, "num_labels is 3 but"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(
    saved: dict[str, str], name: str, options: dict, message: str
) -> None:
    with pytest.raises((OSError, ValueError), match=message) as error:
        load_base(saved.get(name, name), **options)
    assert "\n" not in str(error.value)


def test_folders_that_hold_no_model(tmp_path: Path, saved: dict[str, str]) -> None:
    with pytest.raises(OSError, match="holds no config"):
        load_base(tmp_path)
    with pytest.raises(OSError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(OSError, match="holds no image processor"):
        load_processor(tmp_path)
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(OSError, match="is an adapter, no base"):
        load_base(tmp_path)
    with pytest.raises(OSError, match="is a file"):
        load_base(tmp_path / "adapter.json")
    (tmp_path / "config.json").write_text("{ no json")
    with pytest.raises(OSError, match="cannot be loaded"):
        load_base(tmp_path)


def test_damaged_weights_are_named(saved: dict[str, str], tmp_path: Path) -> None:
    load_base(saved["bert"], "masked-lm").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(OSError, match="its files may be damaged") as error:
        load_base(tmp_path, "masked-lm")
    assert "\n" not in str(error.value)
