"""Every command does its work, and says in one line what is wrong with its input."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import deltaworks as dw
from deltaworks.cli import COMMANDS, main


def run(*arguments: str) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0


def refused(capsys, *arguments: str) -> str:
    """The one line a refused command prints."""
    capsys.readouterr()
    assert run(*arguments) != 0
    said = capsys.readouterr().err.strip()
    assert said.startswith("deltaworks: ") and "\n" not in said, said
    return said


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with the nursery's tokenizer, on disk."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from deltaworks import nursery

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(nursery.base_path("decoder"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"number {i}"}) + "\n" for i in range(40)))
    return file


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "one"
    options = [
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--max-length",
        "32",
        "--sample-length",
        "4",
        "--output",
        str(output),
    ]
    with pytest.raises(SystemExit) as end:
        main(["tune", "--base", str(base), "--data", str(data), "--set", "rank=2", *options])
    assert not end.value.code
    return output


def test_tune_leaves_what_it_promises(tuned) -> None:
    metrics = json.loads((tuned / "metrics.json").read_text())
    assert metrics["steps"] == 3 and metrics["before"]["loss"] > 0 and len(metrics["samples"]["after"]) == 3
    assert (tuned / "adapter" / "adapter.json").is_file() and (tuned / "report.html").stat().st_size > 1000
    assert "rank: 2" in (tuned / "recipe.yaml").read_text()
    assert not (tuned / "checkpoints").exists()


def test_tune_shows_a_person_what_came_out(base, data, tmp_path, capsys) -> None:
    options = ["--steps", "2", "--batch-size", "2", "--sample-length", "4", "--output", tmp_path / "run"]
    assert run("tune", "--base", base, "--data", data, "--method", "ia3", *options) == 0
    said = capsys.readouterr().out
    for word in ("training", "held-out example 3", "before", "after", "memory", "report.html", "% of the base"):
        assert word in said, word


def test_tune_prints_only_json_for_machines(base, data, tmp_path, capsys) -> None:
    options = ["--steps", "1", "--batch-size", "2", "--samples", "0", "--output", tmp_path / "run", "--json"]
    assert run("tune", "--base", base, "--data", data, *options) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_tune_says_what_is_wrong(base, data, tuned, tmp_path, capsys) -> None:
    ours = ["tune", "--base", base, "--data", data, "--output", tmp_path / "run"]
    assert "did you mean" in (said := refused(capsys, *ours, "--method", "lroa")) and "lora" in said
    assert "no hyper-parameter 'rnak'" in refused(capsys, *ours, "--set", "rnak=3")
    assert "rank=0" in refused(capsys, *ours, "--set", "rank=0")
    assert "NAME=VALUE" in refused(capsys, *ours, "--set", "rank")
    assert "attention.qeury" in refused(capsys, *ours, "--set", "on=attention.qeury")
    assert "no such" in refused(capsys, *ours, "--data", tmp_path / "none.jsonl")
    assert "no such folder" in refused(capsys, *ours, "--base", tmp_path / "none")
    assert "exists already" in refused(capsys, "tune", "--base", base, "--data", data, "--output", tuned)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert "broken.jsonl" in (said := refused(capsys, *ours, "--data", broken)) and "2" in said
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bsae: x\n")
    assert "did you mean base" in refused(capsys, "tune", recipe)
    assert not (tmp_path / "run" / "adapter").exists()


def test_methods_lists_the_registry(base, capsys) -> None:
    assert run("methods", "--json") == 0
    assert {row["method"] for row in json.loads(capsys.readouterr().out)} == set(dw.methods())
    assert run("methods", "--base", base, "--json") == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    from deltaworks.model.loading import load_base

    model = load_base(base)
    summary = dw.attach(model, dw.LoRA()).summary()
    assert rows["lora"]["trainable"] == summary.trainable and rows["lora"]["saved_bytes"] == summary.stored_bytes
    assert all("trainable" in row or row["reason"] for row in rows.values())
    assert run("methods", "lora") == 0
    said = capsys.readouterr().out
    assert "2106.09685" in said and "rank" in said
    assert "did you mean" in (said := refused(capsys, "methods", "lroa")) and "lora" in said
    assert "no family" in refused(capsys, "methods", "--family", "none")


def test_inspect_shows_roles_and_marks_sites(base, tuned, capsys) -> None:
    assert run("inspect", base, "--on", "attention.query") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "●" in line]) == 1 and any("0-1" in line for line in lines)
    assert run("inspect", base, "--method", "ia3", "--json") == 0
    assert json.loads(capsys.readouterr().out)
    assert run("inspect", tuned / "adapter") == 0
    assert "lora" in capsys.readouterr().out
    assert "attention.query" in refused(capsys, "inspect", base, "--on", "attention.qeury")
    assert "no such folder" in refused(capsys, "inspect", "./none")
    assert "one of them" in refused(capsys, "inspect", base, "--on", "mlp", "--method", "lora")


def test_merge_gives_an_ordinary_model_with_the_same_output(base, tuned, tmp_path, capsys) -> None:
    from transformers import AutoModelForCausalLM

    from deltaworks.model.loading import load_base

    assert run("merge", tuned / "adapter", "--output", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    beside = load_base(base)
    dw.load(beside, tuned / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(merged(ids).logits, beside(ids).logits, atol=1e-5)
    assert "exists already" in refused(capsys, "merge", tuned / "adapter", "--output", tmp_path / "merged")
    assert "none" in refused(capsys, "merge", tmp_path / "none", "--output", tmp_path / "other")


def test_export_writes_what_peft_loads(base, tuned, tmp_path, capsys) -> None:
    peft = pytest.importorskip("peft")
    from deltaworks.model.loading import load_base

    assert run("export", tuned / "adapter", "--output", tmp_path / "peft") == 0
    theirs = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "peft").eval()
    ours = load_base(base)
    dw.load(ours, tuned / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-5)
    assert run("export", tmp_path / "peft", "--format", "deltaworks", "--base", base, "--output", tmp_path / "own") == 0
    assert run("export", tuned / "adapter", "--format", "vllm", "--output", tmp_path / "vllm", "--json") == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["format"] == "vllm"
    assert "peft, vllm or deltaworks" in refused(capsys, "export", tuned / "adapter", "--format", "x", "--output", "y")
    assert "--rank" in refused(capsys, "export", tuned / "adapter", "--rank", "3", "--output", tmp_path / "z")


def test_chat_answers_and_switches(base, tuned, capsys, monkeypatch) -> None:
    lines = iter(["hello", "/adapter base", "/adapter", "/adapter one", "/reset", "/what", "hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt) or next(lines))
    assert run("chat", tuned / "adapter", "--max-new-tokens", "3", "--temperature", "0") == 0
    said = capsys.readouterr().out
    assert "[one] >" in said and "[base] >" in said and "there are: one, base" in said and "/what is no command" in said


def test_chat_needs_a_base(capsys, tmp_path) -> None:
    assert "--base" in refused(capsys, "chat")
    assert "none" in refused(capsys, "chat", tmp_path / "none")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys) -> None:
    assert run(name, "--help") == 0
    assert "Example" in capsys.readouterr().out


def test_the_overview_needs_no_torch() -> None:
    import subprocess

    code = (
        "import sys\nfrom deltaworks.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_unknown_commands_and_options_end_with_a_status(capsys) -> None:
    assert run("tnue") == 2 and run("tune", "--stepz", "3") == 2
