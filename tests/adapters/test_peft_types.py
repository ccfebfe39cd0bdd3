"""Every type of PEFT that a method here has: its files are read and written, and the logits are equal in float64."""

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
from torch import nn

import deltaworks as dw
from deltaworks.adapters.peft import KINDS
from tests.adapters.adapted import assert_agree, family, logits, move, ours_to_both, refused, theirs_to_ours_to_theirs
from tests.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = ["q_proj", "down_proj"]
CONVOLUTIONS = ["conv1", "stem"]


THEIRS: dict[str, tuple[str, peft.PeftConfig]] = {
    "miss": ("llama", peft.MissConfig(target_modules=LINEAR, r=4)),
    "miss that does not divide": ("llama", peft.MissConfig(target_modules=LINEAR, r=5)),
    "miss with a mini pattern": ("llama", peft.MissConfig(target_modules=LINEAR, r=4, mini_r=8, init_weights="mini")),
    "bone": ("llama", peft.MissConfig(target_modules=LINEAR, r=4, init_weights="bat")),
    "miss and biases": ("bert", peft.MissConfig(target_modules=["query"], r=4, bias="MiSS_only")),
    "hra": ("llama", peft.HRAConfig(target_modules=LINEAR, r=4)),
    "hra, strict": ("llama", peft.HRAConfig(target_modules=LINEAR, r=3, apply_GS=True)),
    "hra on convolutions": ("cnn", peft.HRAConfig(target_modules=CONVOLUTIONS, r=4)),
    "hra and biases": ("bert", peft.HRAConfig(target_modules=["query"], r=4, bias="all")),
    "oft": ("llama", peft.OFTConfig(target_modules=LINEAR)),
    "oft, shared": ("llama", peft.OFTConfig(target_modules=LINEAR, oft_block_size=8, block_share=True)),
    "oft, exact": ("llama", peft.OFTConfig(target_modules=LINEAR, oft_block_size=7, use_cayley_neumann=False)),
    "oft, three terms": ("llama", peft.OFTConfig(target_modules=LINEAR, num_cayley_neumann_terms=3)),
    "oft by number of blocks": ("llama", peft.OFTConfig(target_modules=LINEAR, r=4, oft_block_size=0)),
    "oft on a leash": ("bert", peft.OFTConfig(target_modules=["query"], coft=True, eps=0.1, bias="oft_only")),
    "boft": ("llama", peft.BOFTConfig(target_modules=LINEAR)),
    "boft by number of blocks": ("llama", peft.BOFTConfig(target_modules=LINEAR, boft_block_size=0, boft_block_num=4)),
    "boft on convolutions": ("cnn", peft.BOFTConfig(target_modules=CONVOLUTIONS, boft_block_size=3, bias="boft_only")),
    "loha": (
        "llama",
        peft.LoHaConfig(target_modules=LINEAR, r=4, alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={"0.*": 3}),
    ),
    "loha on convolutions": ("cnn", peft.LoHaConfig(target_modules=CONVOLUTIONS, r=4)),
    "loha with cores": ("cnn", peft.LoHaConfig(target_modules=CONVOLUTIONS, r=2, alpha=64, use_effective_conv2d=True)),
    "lokr": ("llama", peft.LoKrConfig(target_modules=LINEAR, r=2, alpha=6, rank_pattern={"q_proj": 3})),
    "lokr of thin factors": (
        "llama",
        peft.LoKrConfig(target_modules=LINEAR, r=1, decompose_both=True, decompose_factor=4, init_weights="lycoris"),
    ),
    "lokr on convolutions": ("cnn", peft.LoKrConfig(target_modules=CONVOLUTIONS, r=2)),
    "lokr of thin factors on convolutions": ("cnn", peft.LoKrConfig(target_modules=CONVOLUTIONS, r=1)),
    "lokr with cores": ("cnn", peft.LoKrConfig(target_modules=CONVOLUTIONS, r=1, alpha=8, use_effective_conv2d=True)),
    "lokr with cores and thin factors": (
        "cnn",
        peft.LoKrConfig(
            target_modules=CONVOLUTIONS,
            r=1,
            alpha=8,
            use_effective_conv2d=True,
            decompose_both=True,
            decompose_factor=4,
        ),
    ),
    "randlora": ("llama", peft.RandLoraConfig(target_modules=LINEAR, r=5, randlora_alpha=40)),
    "randlora by its seed": ("gpt2", peft.RandLoraConfig(target_modules=["c_attn"], r=4, save_projection=False)),
    "randlora, sparse": ("llama", peft.RandLoraConfig(target_modules=LINEAR, r=4, sparse=True, projection_prng_key=3)),
    "randlora, very sparse": ("llama", peft.RandLoraConfig(target_modules=LINEAR, r=4, very_sparse=True)),
    "glora": ("bert", peft.GloraConfig(target_modules=["query"], r=3)),
    "glora of vectors": (
        "bert",
        peft.GloraConfig(target_modules=["query"], config_A_B="vector", config_C="vector", config_D_E="vector"),
    ),
    "glora of constants": ("bert", peft.GloraConfig(target_modules=["query"], config_A_B="constant", config_C="none")),
    "glora without biases": ("llama", peft.GloraConfig(target_modules=LINEAR)),
}


@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_saves_we_load_and_what_we_save_of_it_peft_loads(case: str, tmp_path: Path) -> None:
    name, config = THEIRS[case]
    tolerance = 1e-7 if case == "oft on a leash" else 1e-10  # its length is single precision there
    tuned = theirs_to_ours_to_theirs(name, config, tmp_path, torch.float64, tolerance)
    # What the method says of itself makes parts of the same shapes again.
    if config.peft_type != peft.PeftType.GLORA:
        fresh = dw.attach(family(name, torch.float64)[0], tuned.method, seed=0)
        assert [p.shape for p in fresh.parameters()] == [p.shape for p in tuned.parameters() if not is_bias(tuned, p)]


def test_a_core_of_one_axis_is_read_and_written(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(12, 32, 3), nn.Conv1d(32, 9, 1)).double()

    x = torch.randn(2, 12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = peft.LoKrConfig(target_modules=["0", "1"], r=2, alpha=8, use_effective_conv2d=True)
    theirs: Any = peft.get_peft_model(made(), config).double().eval()  # type: ignore[arg-type]
    move([value for value in theirs.parameters() if value.requires_grad], 0.3)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = made()
    dw.load(ours, tmp_path / "theirs")
    assert_agree(ours(x), theirs(x), made()(x))
    dw.save(ours, tmp_path / "ours", format="peft")
    again: Any = peft.PeftModel.from_pretrained(made(), str(tmp_path / "ours")).double().eval()  # type: ignore[arg-type]
    assert_agree(again(x), theirs(x), made()(x))


def is_bias(tuned: dw.Tuned, parameter: nn.Parameter) -> bool:
    return any(p is parameter for name, p in tuned.named_parameters() if "bias" in name)


OURS: dict[str, tuple[str, Any]] = {
    "miss": ("llama", dw.MiSS(rank=4)),
    "miss with a mini pattern": ("llama", dw.MiSS(rank=4, mini=4)),
    "bone": ("llama", dw.BoneBAT(rank=4)),
    "hra": ("llama", dw.HRA(rank=4)),
    "hra, strict": ("llama", dw.HRA(rank=3, strict=True)),
    "oft": ("llama", dw.OFT(block=7)),
    "oft, exact": ("llama", dw.OFT(block=8, terms=None, share=True)),
    "oft off its leash": ("bert", dw.OFT(on="attention.query", eps=0.1)),
    "boft": ("llama", dw.BOFT()),
    "loha": ("llama", dw.LoHa(rank=4, overrides={"q_proj": {"rank": 2}, "0.*v_proj": {"alpha": 5.0}})),
    "loha as in LyCORIS": ("llama", dw.LoHa(rank=2, init="lycoris")),
    "lokr": ("llama", dw.LoKr(rank=3)),
    "lokr as in LyCORIS": ("llama", dw.LoKr(rank=2, init="lycoris", factor=4, both=True)),
    "lokr, full factors": ("llama", dw.LoKr(rank=100, init="lycoris")),
    "lokr on convolutions": ("cnn", dw.LoKr(rank=2, on=nn.Conv2d)),
    "lokr with cores": ("cnn", dw.LoKr(rank=1, alpha=64.0, on=nn.Conv2d, tucker=True, init="lycoris")),
    "krona": ("llama", dw.KronA(on="attention.query", rows=4, columns=4)),
    "diffusekrona": ("llama", dw.DiffuseKronA(on="attention.query", rows=4, columns=4)),
    "randlora": ("llama", dw.RandLoRA(rank=4, seed=5)),
    "glora": ("bert", dw.GLoRA(rank=3)),
    "glora, one term of each pair": ("bert", dw.GLoRA(b="none", d="none")),
    "glora, weights alone": ("llama", dw.GLoRA(a="vector", b="vector", c="none", d="none", e="none")),
    "olora": ("llama", dw.OLoRA(rank=4)),
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_save_peft_loads_and_so_do_we(case: str, tmp_path: Path) -> None:
    ours_to_both(*OURS[case], tmp_path, torch.float64)


def test_butterflies_of_several_stages_are_written_with_a_word_of_warning(tmp_path: Path) -> None:
    model, batch = family("llama", torch.float64)
    move(dw.attach(model, dw.BOFT(stages=2), seed=0).parameters())
    with pytest.warns(UserWarning, match="stages=2 only where its CUDA extension"):
        dw.save(model, tmp_path, format="peft")
    ours, _ = family("llama", torch.float64)
    assert dw.load(ours, tmp_path).method == dw.BOFT(stages=2, on=dw.tuned(ours).method.on)
    assert torch.equal(logits(ours, batch), logits(model, batch))


def test_what_acts_in_training_only_is_said_to_be_left_out(tmp_path: Path) -> None:
    model, _ = family("llama", torch.float64)
    config = peft.OFTConfig(target_modules=LINEAR, block_share=True, module_dropout=0.1)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="module_dropout=0.1 is left out; it acts in training only"):
        dw.load(family("llama", torch.float64)[0], tmp_path)


DROPOUTS: dict[str, tuple[peft.PeftConfig, Any]] = {
    "loha": (
        peft.LoHaConfig(target_modules=["q_proj"], rank_dropout=0.1, module_dropout=0.2),
        dw.LoHa(on=["q_proj"], row_dropout=0.1, module_dropout=0.2),
    ),
    "lokr": (
        peft.LoKrConfig(target_modules=["q_proj"], rank_dropout=0.1, rank_dropout_scale=True),
        dw.LoKr(on=["q_proj"], row_dropout=0.1, rescale=True),
    ),
    "oft": (
        peft.OFTConfig(target_modules=["q_proj"], module_dropout=0.1),
        dw.OFT(on=["q_proj"], dropout=0.1),
    ),
    "boft": (peft.BOFTConfig(target_modules=["q_proj"], boft_dropout=0.1), dw.BOFT(on=["q_proj"], dropout=0.1)),
    "miss": (
        peft.MissConfig(target_modules=["q_proj"], r=8, miss_dropout=0.1),
        dw.MiSS(on=["q_proj"], rank=8, dropout=0.1),
    ),
    "randlora": (
        peft.RandLoraConfig(target_modules=["q_proj"], randlora_dropout=0.1),
        dw.RandLoRA(on=["q_proj"], alpha=640, dropout=0.1),
    ),
}


@pytest.mark.parametrize("case", DROPOUTS)
def test_dropouts_are_taken_along_both_ways(case: str, tmp_path: Path) -> None:
    config, method = DROPOUTS[case]
    peft.get_peft_model(FAMILIES["llama"]()[0], config).save_pretrained(tmp_path / "theirs")
    model, _ = FAMILIES["llama"]()
    assert dw.load(model, tmp_path / "theirs").method == method
    dw.save(model, tmp_path / "ours", format="peft")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for key, value in config.to_dict().items():
        if "dropout" in key:
            assert written[key] == value, key


UNWRITABLE: dict[str, tuple[str, Any, str]] = {
    "bone along the output": ("llama", dw.BoneBAT(along="out"), "along='out'"),
    "two ranks": ("llama", dw.MiSS(rank=4, overrides={"q_proj": {"rank": 2}}), "rank: PEFT has one .* 2, 4|4, 2"),
    "blocks that no one side leads to": (
        "llama",
        dw.OFT(block=8, overrides={"q_proj": {"block": 16}}),
        r"block: PEFT has one for all layers, here are \[8, 16\]",
    ),
    "other splits": ("llama", dw.KronA(), "splits the sides otherwise"),
    "parts of fused layers": ("phi3", dw.HRA(on="attention.query"), "PEFT adapts whole layers"),
    "layers that PEFT has no class for": ("gpt2", dw.LoHa(on="attention.query"), "PEFT adapts whole layers"),
    "transposed layers": ("gpt2", dw.LoHa(on="mlp.down"), "does not adapt Conv1D so"),
    "a bias that is not there": ("llama", dw.GLoRA(), "the base has none, and PEFT makes none"),
    "two kinds": ("bert", dw.GLoRA(a="lora", b="vector"), "config_A_B: .* lora, vector"),
    "a supernet": ("bert", dw.GLoRA(supernet=True), "search first"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_peft_cannot_express_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, method, reason = UNWRITABLE[case]
    model, _ = family(name, torch.float64)
    dw.attach(model, method, seed=0)
    with pytest.raises(ValueError, match=reason) as caught:
        dw.save(model, tmp_path / "out", format="peft")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


UNREADABLE: dict[str, tuple[str, peft.PeftConfig, dict[str, Any], str]] = {
    "another rank": ("llama", peft.MissConfig(target_modules=LINEAR, r=4), {"r": 3}, r"says \[3, 32\]"),
    "an unknown form": (
        "llama",
        peft.MissConfig(target_modules=LINEAR, r=4),
        {"init_weights": "x"},
        "'x' is not known",
    ),
    "an odd chain": ("llama", peft.HRAConfig(target_modules=LINEAR, r=3), {}, "rank=3 .* must be even"),
    "a convolution turned by patches": (
        "cnn",
        peft.OFTConfig(target_modules=CONVOLUTIONS, oft_block_size=3),
        {},
        "is a Conv2d, which OFT does not adapt so",
    ),
    "few terms": ("llama", peft.OFTConfig(target_modules=LINEAR, num_cayley_neumann_terms=2), {}, "terms=2"),
    "two sizes of blocks": ("llama", peft.OFTConfig(target_modules=LINEAR), {"r": 2}, "one of them must be above 0"),
    "another factor": ("llama", peft.LoKrConfig(target_modules=LINEAR), {"decompose_factor": 2}, "decompose|lokr_w"),
    "another kind": ("bert", peft.GloraConfig(target_modules=["query"]), {"config_A_B": "vector"}, "glora_A.X"),
    "a kind that is not": (
        "bert",
        peft.GloraConfig(target_modules=["query"]),
        {"config_C": "constant"},
        "c='constant'",
    ),
    "another seed": ("llama", peft.RandLoraConfig(target_modules=LINEAR), {"projection_prng_key": 1}, "prng_key=1"),
    "dora on a moved base": (
        "llama",
        peft.LoraConfig(target_modules=LINEAR, use_dora=True),
        {"init_lora_weights": "olora"},
        "'olora' with use_dora",
    ),
    "quantised by loftq": (
        "llama",
        peft.LoraConfig(target_modules=LINEAR),
        {"init_lora_weights": "loftq"},
        "'loftq' expects a base that was changed",
    ),
    "a key of the future": ("llama", peft.BOFTConfig(target_modules=LINEAR), {"tomorrow": 1}, "tomorrow=1|'1'"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_another_variant_or_unknown_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, config, change, reason = UNREADABLE[case]
    model, _ = FAMILIES[name]()
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = refused(FAMILIES[name]()[0], tmp_path)
    assert re.search(reason, message), message


def test_other_bases_than_the_seeds_are_refused(tmp_path: Path) -> None:
    model, _ = FAMILIES["llama"]()
    peft.get_peft_model(model, peft.RandLoraConfig(target_modules=LINEAR, r=4)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[next(name for name in tensors if name.endswith("randlora_B"))] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "are not those of projection_prng_key=0" in refused(FAMILIES["llama"]()[0], tmp_path)


def test_every_type_that_both_libraries_have_is_read_and_written() -> None:
    """A weight delta of PEFT that is a method here is in the table; this fails when either gains one."""
    otherwise = {"VBLORA": "vb_lora"}
    families = ("lowrank", "structured", "adaptive")
    ours = {slug for slug, method in dw.methods().items() if method.family in families}
    shared = {kind.value for kind in peft.PeftType if otherwise.get(kind.value, kind.value.lower()) in ours}
    assert shared <= set(KINDS) and len(shared) > 12
