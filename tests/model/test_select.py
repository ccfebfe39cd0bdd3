"""From `on=` to sites."""

from __future__ import annotations

import functools

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaworks.model.anatomy import Anatomy, Site, describe, select
from deltaworks.model.kinds import is_linear
from tests.families import FAMILIES


@functools.cache
def described(name: str) -> Anatomy:
    return describe(FAMILIES[name]()[0])


def names(name: str, on: object, what: str = "weight") -> list[str]:
    return [site.name for site in described(name).select(on, what)]  # type: ignore[arg-type]


def test_a_role_names_its_layers_in_all_blocks() -> None:
    assert names("llama", "attention.query") == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_the_first_part_of_a_role_names_the_linear_layers_below_it() -> None:
    assert len(names("qwen3", "attention")) == 2 * 4
    assert not any("norm" in name for name in names("qwen3", "attention"))
    assert len(names("llama", "mlp")) == 2 * 3
    assert [name.rpartition(".")[2] for name in names("bart", "cross_attention")] == [
        "k_proj", "v_proj", "q_proj", "out_proj"
    ] * 2  # fmt: skip
    assert len(names("bart", "attention")) == 4 * 4


def test_norm_names_every_norm() -> None:
    assert len(names("llama", "norm")) == 2 * 2 + 1
    assert names("llama", "norm.final") == ["model.norm"]
    assert len(names("qwen3", "norm")) == 2 * 4 + 1


def test_a_fused_layer_is_given_whole_unless_a_part_is_asked_for() -> None:
    assert names("gpt2", "attention")[:2] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    (first, _) = described("gpt2").select("attention.value")
    assert (first.part, first.rows) == ("value", tuple(range(64, 96)))
    assert names("phi3", "mlp.up")[0] == "model.layers.0.mlp.gate_up_proj[up]"
    assert names("mixtral", "expert.gate")[0] == "model.layers.0.mlp.experts.gate_up_proj[gate]"


def test_a_part_is_dropped_where_its_whole_is_selected_too() -> None:
    assert names("gpt2", ["attention.query", "attention.qkv"]) == names("gpt2", "attention.qkv")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("mlp", "cnn")])
def test_all_is_every_linear_map_of_the_blocks_and_nothing_else(name: str) -> None:
    anatomy = described(name)
    chosen = {(site.path, site.parameter) for site in anatomy.select("all")}
    wanted = set()
    for block in anatomy.blocks:
        for path, module in anatomy.model.get_submodule(block.path).named_modules():
            full = f"{block.path}.{path}"
            if is_linear(module) and full != block.router:
                wanted.add((full, "weight"))
            elif full == block.experts:
                wanted |= {(full, "gate_up_proj"), (full, "down_proj")}
    assert chosen == wanted


def test_all_leaves_embeddings_heads_and_routers_alone() -> None:
    for name in FAMILIES:
        roles = {site.role for site in described(name).select("all")}
        assert not roles & {"embedding", "head", "router", "position", "head.transform", "pooler"}


def test_all_in_a_model_without_blocks_is_all_its_linear_layers() -> None:
    assert names("mlp", "all") == ["first", "second", "last"]


def test_convolutions_are_taken_where_a_block_has_no_linear_layer() -> None:
    assert names("cnn", "all") == ["stages.0.mix", "stages.1.mix"]
    assert len(names("cnn", "conv")) == 4
    plain = nn.Sequential(*[
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)) for _ in range(2)
    ])  # fmt: skip
    assert [site.path for site in select(plain, "all")] == ["0.0", "0.2", "1.0", "1.2"]


def test_regular_expressions_match_to_the_end_of_a_name_from_a_dot_on() -> None:
    assert len(names("llama", "q_proj")) == 2
    assert names("llama", r"layers.1.self_attn.[qv]_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    model = nn.ModuleDict(
        {"attn": nn.ModuleDict({"q": nn.Linear(2, 2)}), "xattn": nn.ModuleDict({"q": nn.Linear(2, 2)})}
    )
    assert [site.path for site in select(model, "attn.q")] == ["attn.q"]
    with pytest.raises(ValueError, match="matches nothing"):
        select(model, "ttn.q")
    with pytest.raises(ValueError, match="matches nothing"):
        select(model, "attn.q.x")


def test_an_expression_can_name_what_no_role_would() -> None:
    assert names("llama", "lm_head") == ["lm_head"]
    assert names("llama", "embed_tokens") == ["model.embed_tokens"]
    assert names("mixtral", r"experts\.down_proj") == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]


def test_a_module_that_is_no_layer_stands_for_the_linear_layers_in_it() -> None:
    assert names("llama", r"layers\.0\.mlp") == [
        f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]


def test_module_types_and_their_names() -> None:
    assert len(names("llama", nn.Linear)) == 2 * 7 + 1
    assert names("llama", nn.Linear) == names("llama", "Linear")
    assert len(names("gpt2", Conv1D)) == len(names("gpt2", "Conv1D")) == 2 * 4
    assert len(names("falcon", "FalconLinear")) == 2 * 4
    assert names("cnn", nn.Conv2d)[0] == "stem"
    assert len(names("llama", "LlamaRMSNorm")) == 5


def test_lists_are_unions_in_model_order_without_repetition() -> None:
    once = names("llama", ["mlp.down", "attention.query", "q_proj", nn.Embedding])
    assert once == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_whole_modules_by_role_and_by_name() -> None:
    assert names("llama", "block", "module") == ["model.layers.0", "model.layers.1"]
    assert names("bert", "attention", "module") == [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert names("t5", "cross_attention", "module")[0] == "decoder.block.0.layer.1.EncDecAttention"
    assert names("vit", "mlp", "module") == ["vit.layers.0.mlp", "vit.layers.1.mlp"]
    (first, _) = described("llama").select("input_layernorm", "module")
    assert (first.role, first.block) == ("attention.norm", 0)
    (whole,) = described("llama").select("model.layers.0", "module")
    assert whole == Site("model.layers.0", "block", "block", None, block=0)
    (anything,) = described("llama").select("rotary_emb", "module")
    assert (anything.kind, anything.parameter) == ("other", None)


@pytest.mark.parametrize("on", ["attention.querry", "nothing_like_it", nn.LSTM, "mlp.gate_up", []])
def test_nothing_found_is_an_error_in_one_line_that_lists_what_there_is(on: object) -> None:
    with pytest.raises(ValueError) as error:
        described("llama").select(on)
    assert "\n" not in str(error.value)
    assert "attention.query (2)" in str(error.value) and "q_proj" in str(error.value)


def test_every_member_of_a_list_must_be_there_unless_told_otherwise() -> None:
    with pytest.raises(ValueError, match=r"'mlp.gate_up' matches nothing"):
        described("llama").select(["mlp.down", "mlp.gate_up"])
    assert len(described("llama").select(["mlp.down", "mlp.gate_up"], strict=False)) == 2
    with pytest.raises(ValueError, match="matches nothing"):
        described("llama").select(["mlp.gate_up"], strict=False)


def test_what_is_no_way_to_name_a_site() -> None:
    with pytest.raises(ValueError, match="no regular expression"):
        described("llama").select("q_proj(")
    with pytest.raises(ValueError, match="is a int"):
        described("llama").select(3)
