"""PEFT loads what we write and we load what PEFT writes: the logits are the same, both ways."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaworks as dw
from tests.adapters.adapted import (
    adapted,
    assert_agree,
    family,
    logits,
    move,
    ours_to_both,
    refused,
    theirs_to_ours_to_theirs,
)
from tests.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")
LoRA, AdaLoRA, Prompt, Prefix = peft.LoraConfig, peft.AdaLoraConfig, peft.PromptTuningConfig, peft.PrefixTuningConfig
TOKENS = 4


THEIRS: dict[str, tuple[str, peft.PeftConfig]] = {
    "patterns and rslora": (
        "llama",
        LoRA(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"layers.0.*q_proj": 2},
            alpha_pattern={"v_proj": 3},
            use_rslora=True,
            task_type="CAUSAL_LM",
        ),
    ),
    "patterns that meet": (
        "llama",
        LoRA(target_modules=["q_proj"], rank_pattern={"layers.0.*": 2}, alpha_pattern={"layers.1.*": 5, "q_proj": 3}),
    ),
    "dora": ("llama", LoRA(target_modules=["q_proj", "embed_tokens"], use_dora=True)),
    "dora and rslora": ("t5", LoRA(target_modules=["q"], use_dora=True, use_rslora=True)),
    "embedding and saved head": ("llama", LoRA(target_modules=["embed_tokens"], modules_to_save=["lm_head"])),
    "a regular expression": ("llama", LoRA(target_modules=r".*layers\.1\..*(k|v)_proj")),
    "all linear, some excluded": ("llama", LoRA(target_modules="all-linear", exclude_modules=["k_proj"])),
    "some layers": ("llama", LoRA(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "pissa": ("llama", LoRA(target_modules=["q_proj"], init_lora_weights="pissa")),
    "olora": ("llama", LoRA(target_modules=["q_proj"], init_lora_weights="olora", r=4)),
    "olora and rslora": ("llama", LoRA(target_modules=["up_proj"], init_lora_weights="olora", use_rslora=True, r=4)),
    "all biases": ("gpt2", LoRA(target_modules=["c_attn", "c_proj"], bias="all", task_type="CAUSAL_LM")),
    "some biases and dora": ("gpt2", LoRA(target_modules=["c_attn"], bias="lora_only", use_dora=True)),
    "all biases and a saved module": (
        "bert",
        LoRA(target_modules=["query"], bias="all", modules_to_save=["predictions.transform.dense"]),
    ),
    "a classifier": ("bert_classification", LoRA(target_modules=["query"], task_type="SEQ_CLS")),
    "an encoder-decoder": ("t5", LoRA(target_modules=["q", "v", "wi_0"], task_type="SEQ_2_SEQ_LM")),
    "experts": (
        "mixtral",
        LoRA(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 3},
        ),
    ),
    "one parameter of the experts": ("mixtral", LoRA(target_modules=[], target_parameters=["experts.down_proj"])),
    "convolutions": ("cnn", LoRA(target_modules=["conv1", "stem"])),
    "convolutions with dora": ("cnn", LoRA(target_modules=["conv1", "stem"], use_dora=True)),
    "ia3 on a decoder": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3 on an encoder": (
        "bert",
        peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "ia3 on an encoder-decoder": (
        "t5",
        peft.IA3Config(target_modules=["k", "v", "wi_1"], feedforward_modules=[]),
    ),
    "ia3 on Conv1D": (
        "gpt2",
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
    "norms of a decoder": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "norms of an encoder": (
        "bert",
        peft.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["predictions.transform.dense"]),
    ),
    "norms of an encoder-decoder": ("t5", peft.LNTuningConfig(target_modules=["layer_norm"])),
    "adalora with biases": ("bert", AdaLoRA(target_modules=["query"], total_step=10, init_r=6, target_r=3, bias="all")),
    "prompt of a decoder": ("llama", Prompt(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")),
    "prompt of Conv1D": ("gpt2", Prompt(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")),
    "prompt of a classifier": ("bert_classification", Prompt(num_virtual_tokens=TOKENS, task_type="SEQ_CLS")),
    "prompt of a tagger": ("bert_tokens", Prompt(num_virtual_tokens=TOKENS, task_type="TOKEN_CLS")),
    "prompt of an encoder-decoder": ("t5", Prompt(num_virtual_tokens=TOKENS, task_type="SEQ_2_SEQ_LM")),
    "prefix of a decoder": ("llama", Prefix(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")),
    "prefix through an MLP": (
        "gpt2",
        Prefix(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8),
    ),
    "prefix of an encoder": ("bert_classification", Prefix(num_virtual_tokens=TOKENS, task_type="SEQ_CLS")),
    "prefix of an encoder-decoder": ("bart", Prefix(num_virtual_tokens=TOKENS, task_type="SEQ_2_SEQ_LM")),
}
for _family, _names in (
    ("llama", ["q_proj", "down_proj"]),
    ("bert", ["query"]),
    ("t5", ["q", "wo"]),
    ("gpt2", ["c_attn"]),
):
    THEIRS[f"vera on {_family}"] = (_family, peft.VeraConfig(target_modules=_names, r=4))
    THEIRS[f"fourierft on {_family}"] = (
        _family,
        peft.FourierFTConfig(target_modules=_names, n_frequency=10, n_frequency_pattern={_names[0]: 7}),
    )
    THEIRS[f"adalora on {_family}"] = (_family, AdaLoRA(target_modules=_names, total_step=10, init_r=6, target_r=3))
    if _family != "gpt2":  # PEFT's C3A knows no Conv1D
        THEIRS[f"c3a on {_family}"] = (
            _family,
            peft.C3AConfig(target_modules=_names, block_size=8, block_size_pattern={_names[0]: 16}),
        )


@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_saves_we_load_and_what_we_save_of_it_peft_loads(case: str, tmp_path: Path) -> None:
    theirs_to_ours_to_theirs(*THEIRS[case], tmp_path)


OURS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    **{
        f"lora on {name}": (name, dw.LoRA(rank=4), {})
        for name in ("llama", "bert", "t5", "gpt2", "mixtral", "phi3", "cnn")
    },
    **{
        f"pissa on {name}": (name, dw.PiSSA(rank=4, alpha=6.0), {})
        for name in ("llama", "bert", "t5", "gpt2", "mixtral")
    },
    **{f"dora on {name}": (name, dw.DoRA(rank=4), {}) for name in ("llama", "bert", "t5", "gpt2")},
    **{f"vera on {name}": (name, dw.VeRA(rank=4, d_initial=1.0), {}) for name in ("llama", "bert", "t5")},
    **{f"fourierft on {name}": (name, dw.FourierFT(n=12, seed=3, alpha=100.0), {}) for name in ("llama", "bert", "t5")},
    **{f"c3a on {name}": (name, dw.C3A(), {}) for name in ("llama", "bert", "t5")},
    **{f"adalora on {name}": (name, dw.AdaLoRA(), {}) for name in ("llama", "bert", "t5")},
    **{f"ia3 on {name}": (name, dw.IA3(), {}) for name in ("llama", "bert", "t5", "phi3")},
    **{f"norms of {name}": (name, dw.LayerNorm(on="norm"), {}) for name in ("llama", "bert", "t5")},
    "other ranks and scales": (
        "llama",
        dw.LoRA(rank=4, rslora=True, dropout=0.1, overrides={"0.*q_proj": {"rank": 2}, "v_proj": {"alpha": 5.0}}),
        {},
    ),
    "one factor frozen": ("t5", dw.LoRAFA(rank=4), {}),
    "parts of fused layers": ("phi3", dw.LoRA(rank=4, on=["attention.query", "attention.value", "mlp.up"]), {}),
    "a part of the experts": ("mixtral", dw.LoRA(rank=4, on="expert.up"), {}),
    "c3a as in its paper": ("llama", dw.C3A(normalise=False, block=8), {}),
    "an embedding": ("llama", dw.LoRA(rank=4, on=["embedding", "attention.query"]), {}),
    "a trained head": ("bert_classification", dw.LoRA(rank=4), {"also": "head"}),
    "an untrained head": ("bert_classification", dw.LoRA(rank=4), {}),
    "sounds": ("whisper", dw.LoRA(rank=4, on="attention"), {}),
    "prompt": ("t5", dw.PromptTuning(length=TOKENS), {}),
    "prefix": ("llama", dw.PrefixTuning(length=TOKENS, hidden=8, positions="shifted"), {}),
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_save_peft_loads_and_so_do_we(case: str, tmp_path: Path) -> None:
    name, method, more = OURS[case]
    ours_to_both(name, method, tmp_path, **more)


def test_ranks_that_fell_in_training_are_masks(tmp_path: Path) -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.AdaLoRA(init_rank=6, target_rank=3, t_init=0.1, t_final=0.2), seed=0)
    move(tuned.parameters())
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    rules = tuned.run(6)
    rules.emit("attached")
    for _ in range(6):
        rules.emit("step_begin")
        model(**batch).loss.backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        optimizer.zero_grad()
    rules.emit("finished")
    batch.pop("labels")
    dw.save(model, tmp_path, format="peft")
    masks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert {len(mask) for mask in masks.values()} == {6} and sum(map(sum, masks.values())) == 14 * 3
    theirs = peft.PeftModel.from_pretrained(FAMILIES["llama"]()[0], str(tmp_path)).eval()
    assert_agree(logits(theirs, batch), logits(model, batch), logits(FAMILIES["llama"]()[0], batch))
    ours, _ = FAMILIES["llama"]()
    dw.load(ours, tmp_path)
    assert torch.equal(logits(ours, batch), logits(model, batch))


def test_pissa_becomes_an_ordinary_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model, _ = adapted("llama", dw.PiSSA(rank=4))
    dw.save(model, tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 8, True)
    ours, _ = FAMILIES["llama"]()
    assert dw.load(ours, tmp_path).method.slug == "lora"


def test_patterns_become_overrides(tmp_path: Path) -> None:
    config = LoRA(
        target_modules=["q_proj"], r=4, lora_alpha=8, rank_pattern={"layers.0.*": 2}, alpha_pattern={"layers.0.*": 3}
    )
    peft.get_peft_model(FAMILIES["llama"]()[0], config).save_pretrained(tmp_path)
    method = dw.load(FAMILIES["llama"]()[0], tmp_path).method
    assert method == dw.LoRA(on=["q_proj"], rank=4, alpha=8.0, overrides={"layers.0.*": {"rank": 2, "alpha": 3.0}})


def test_embeddings_that_peft_saved_beside_are_taken_when_they_differ(tmp_path: Path) -> None:
    model, batch = family("llama")
    theirs = peft.get_peft_model(model, LoRA(target_modules=["q_proj"])).eval()
    move([model.get_input_embeddings().weight])
    wanted = logits(theirs, batch)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours, _ = family("llama")
    base = logits(ours, batch)
    dw.load(ours, tmp_path)
    assert_agree(logits(ours, batch), wanted, base)
    dw.detach(ours)
    assert torch.equal(logits(ours, batch), base)


def test_no_tensor_shares_its_storage_with_another(tmp_path: Path) -> None:
    model, _ = FAMILIES["qwen2"]()  # embedding and head are tied
    dw.attach(model, dw.LoRA(rank=2, on=["embedding", "head"]), seed=0)
    dw.save(model, tmp_path, format="peft")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len({value.data_ptr() for value in tensors.values()}) == len(tensors) == 4


UNWRITABLE: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "activation modules": ("bert", dw.Houlsby(), {}, "houlsby cannot be written in PEFT's format: .* at "),
    "biases alone": ("bert", dw.BitFit(), {}, "bitfit .* PEFT saves whole modules"),
    "two dropouts": ("llama", dw.LoRA(dropout=0.1, overrides={"q_proj": {"dropout": 0.2}}), {}, "dropout"),
    "some biases": ("bert", dw.LoRA(rank=2, on="attention.query"), {"also": "norm.embedding"}, ""),
    "vera with two ranks": ("llama", dw.VeRA(rank=4, overrides={"q_proj": {"rank": 2}}), {}, "rank=2"),
    "preferred frequencies": ("llama", dw.FourierFT(n=5, center=3.0), {}, "center=3.0"),
    "c3a with dropout": ("llama", dw.C3A(dropout=0.1), {}, "dropout=0.1"),
    "adalora with two ranks": ("llama", dw.AdaLoRA(overrides={"q_proj": {"alpha": 2.0}}), {}, "overrides at"),
    "a prefix with text at 0": ("llama", dw.PrefixTuning(length=2), {}, "positions='text'"),
    "a prompt read at the text": ("bert_classification", dw.PromptTuning(length=2), {}, "readout='text'"),
    "a tied head": ("qwen2", dw.LoRA(rank=2), {"also": "head"}, "tied"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_peft_cannot_express_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, method, more, reason = UNWRITABLE[case]
    if not reason:
        model, _ = adapted(name, method, **more)
        dw.save(model, tmp_path / "out", format="peft")  # a norm trained beside is a module to save
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
        return
    model, _ = FAMILIES[name]()
    dw.attach(model, method, seed=0, **more)
    with pytest.raises(ValueError, match=reason) as caught:
        dw.save(model, tmp_path / "out", format="peft")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "lora_bias": ({"lora_bias": True}, "lora_bias=.*cannot be expressed"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "activated lora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "single tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "a key of the future": ({"use_tomorrow": "yes"}, "use_tomorrow='yes' is not known for LORA"),
    "a start that changes the base": ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
    "a random start that changes the base": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model"),
    "an unknown type": ({"peft_type": "XLORA"}, "peft_type='XLORA' cannot be read"),
    "no type": ({"peft_type": None}, "peft_type=None"),
    "another rank": ({"r": 3}, "says rank 3"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "has no tensor .*k_proj"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "does not announce: .*v_proj"),
    "no such target": ({"target_modules": ["W_pack"]}, "names no module"),
    "a broken pattern": ({"target_modules": "q_proj("}, "not a regular expression"),
    "a broken rank pattern": ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    "a rank as text": ({"r": "4"}, "r='4'"),
    "an alpha of zero": ({"lora_alpha": 0}, "alpha=0"),
    "dora without magnitudes": ({"use_dora": True}, "lora_magnitude_vector"),
    "biases that are missing": ({"bias": "all", "target_modules": ["q_proj", "v_proj"]}, ""),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_we_cannot_express_or_do_not_know_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, reason = UNREADABLE[case]
    model, _ = adapted("bert" if not reason else "llama", dw.LoRA(rank=4, on=["attention.query", "attention.value"]))
    dw.save(model, tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if not reason:
        change, reason = {"bias": "all"}, "has no tensor .*bias"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    fresh, _ = FAMILIES["bert" if "bias'" in str(change) else "llama"]()
    assert re.search(reason, refused(fresh, tmp_path))


def test_another_projection_than_the_seeds_is_refused(tmp_path: Path) -> None:
    model, _ = adapted("llama", dw.VeRA(rank=4))
    dw.save(model, tmp_path, format="peft")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.vera_A"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "projection_prng_key=0" in refused(FAMILIES["llama"]()[0], tmp_path)


def test_dropout_that_peft_has_not_on_experts_is_warned_of(tmp_path: Path) -> None:
    model, _ = adapted("mixtral", dw.LoRA(rank=2, dropout=0.1, overrides={"experts": {"dropout": 0.0}}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dw.save(model, tmp_path, format="peft")
    assert any("dropout" in str(item.message) for item in caught)
