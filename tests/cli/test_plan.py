"""`deltaworks plan` prints a plan, and `tune` warns of a run that will not fit."""

from __future__ import annotations

import json

import pytest

from deltaworks.cli import main


def run(*arguments: object) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The configuration of a tiny Llama, without weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def test_the_plan_is_a_table_for_people(base, capsys) -> None:
    options = ["--max-length", 64, "--memory", "2MiB", "--batch-size", 4]
    assert run("plan", "--base", base, "--methods", "lora", "full", *options) == 0
    said = capsys.readouterr().out
    for word in ("lora", "full", "logits", "optimizer", "largest batch", "does not fit", "--checkpointing", "2.0 MiB"):
        assert word in said, word


def test_the_plan_is_json_for_machines(base, capsys) -> None:
    arguments = ["plan", "--base", base, "--methods", "lora", "eva", "--set", "rank=2", "--max-length", 32, "--json"]
    assert run(*arguments, "--memory", "1GiB") == 0
    made = json.loads(capsys.readouterr().out)
    lora, eva = made["methods"]
    assert lora["peak"] == sum(lora["split"].values()) and lora["fits"] and lora["largest_batch"] > 8
    assert lora["trainable"] == 2 * (4 * 2 * (32 + 32) + 3 * 2 * (32 + 64)) and lora["time"] > 0.5
    assert made["memory"] == 1 << 30 and not made["reasons"] and eva["trainable"] == lora["trainable"]


def test_what_is_wrong_is_said_in_one_line(base, capsys) -> None:
    for wanted, arguments in {
        "did you mean": ["--methods", "lroa"],
        "24GiB": ["--memory", "much"],
        "none of lora": ["--methods", "lora", "--set", "colour=3"],
        "one of int8": ["--quantize", "int3"],
        "task": ["--task", "sculpture"],
    }.items():
        assert run("plan", "--base", base, *arguments) == 1
        said = capsys.readouterr().err.strip()
        assert said.startswith("deltaworks: ") and "\n" not in said and wanted in said, said
    assert run("plan", "--base", "./nowhere") == 1
    assert "no such folder" in capsys.readouterr().err


def test_tune_warns_before_it_loads_a_base_that_will_not_fit(monkeypatch, tmp_path, capsys) -> None:
    from deltaworks.study import plan as planning

    monkeypatch.setattr(planning, "free", lambda device: 1 << 20)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(8)))
    options = ["--steps", 1, "--samples", 0, "--batch-size", 2, "--validation", 0, "--json"]
    assert run("tune", "--data", rows, *options, "--output", tmp_path / "run") == 0
    heard = capsys.readouterr()
    assert "may need" in heard.err and "1.0 MiB are free" in heard.err and heard.err.count("deltaworks:") == 1
    assert json.loads(heard.out)["steps"] == 1
    monkeypatch.setattr(planning, "free", lambda device: 1 << 40)
    assert run("tune", "--data", rows, *options, "--output", tmp_path / "other") == 0
    assert "may need" not in capsys.readouterr().err
