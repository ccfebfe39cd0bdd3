"""The folded tree."""

from __future__ import annotations

import json

import pytest
from torch import nn

from deltaworks.model import tree
from deltaworks.model.anatomy import describe
from tests.families import FAMILIES


def block(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width))


def test_twelve_equal_blocks_are_one_line() -> None:
    text = describe(nn.Sequential(*[block() for _ in range(12)])).tree()
    assert text.count("Linear") == 2
    assert "0-11 Sequential" in text
    assert "12 x 48" in text


def test_siblings_that_differ_stand_apart() -> None:
    stack = nn.ModuleList([block(), block(), nn.Linear(4, 4), block(), block()])
    lines = describe(stack).tree().splitlines()
    assert any("0-1, 3-4 Sequential" in line for line in lines)
    assert any("2 Linear" in line for line in lines)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_counted_once(name: str) -> None:
    model, _ = FAMILIES[name]()
    assert tree.folded(describe(model)).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_roles_shapes_and_marks_stand_in_the_lines() -> None:
    anatomy = describe(FAMILIES["gpt2"]()[0])
    text = anatomy.tree(anatomy.select("attention.query"))
    marked = [line for line in text.splitlines() if "●" in line]
    assert len(marked) == 1
    assert "c_attn Conv1D 96x32" in marked[0] and "attention.qkv" in marked[0] and "[query]" in marked[0]


def test_a_mark_in_one_block_keeps_it_apart() -> None:
    anatomy = describe(FAMILIES["llama"]()[0])
    text = anatomy.tree(anatomy.select(r"layers\.1\.mlp\.up_proj"))
    assert "0 LlamaDecoderLayer" in text and "1 LlamaDecoderLayer" in text


def test_as_plain_values_it_can_be_written_as_json() -> None:
    anatomy = describe(FAMILIES["mixtral"]()[0])
    made = json.loads(json.dumps(tree.as_dict(anatomy, anatomy.select("expert"))))
    layers = made["children"][0]["children"][1]["children"][0]
    assert (layers["name"], layers["times"], layers["roles"]) == ("0-1", 2, ["block"])
    experts = next(child for child in layers["children"] if child["name"] == "mlp")["children"][1]
    assert experts["marked"] == ["down_proj", "gate_up_proj"]
    assert experts["shapes"]["gate_up_proj"] == [4, 96, 32]
