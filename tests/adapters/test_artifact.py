"""A saved adapter is one whole folder, and loading it is the adapter that was saved, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks import adapters
from deltaworks.adapters import files
from deltaworks.adapters.fingerprint import fingerprint, same
from deltaworks.core.part import Trained
from tests.adapters.adapted import adapted, move
from tests.families import FAMILIES

METHODS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lora": ("llama", dw.LoRA(rank=4, rslora=True, overrides={"q_proj": {"rank": 2}}), {}),
    "fused parts": ("phi3", dw.LoRA(rank=4, on=["attention.query", "mlp.up"]), {}),
    "experts": ("mixtral", dw.PiSSA(rank=4), {}),
    "convolutions by type": ("cnn", dw.LoRA(rank=2, on=[nn.Conv2d, "mix"]), {}),
    "dora": ("t5", dw.DoRA(rank=4), {}),
    "shared basis": ("bert", dw.VeRA(rank=4), {}),
    "spectral": ("gpt2", dw.FourierFT(n=8), {}),
    "circulant": ("llama", dw.C3A(), {}),
    "triplets": ("llama", dw.AdaLoRA(), {}),
    "biases that were not there": ("llama", dw.BitFit(), {}),
    "scales": ("t5", dw.IA3(), {}),
    "activation modules": ("bert", dw.Houlsby(), {}),
    "a trained head beside": ("bert_classification", dw.LoRA(rank=2), {"also": "head"}),
    "a soft prompt": ("t5", dw.PromptTuning(length=3), {}),
    "prefixes made by an MLP": ("llama", dw.PrefixTuning(length=3, hidden=4), {}),
    "everything": ("gpt2", dw.Full(), {}),
    "by regular expression": ("mlp", dw.LoRA(rank=2, on="first|last"), {}),
}


@pytest.mark.parametrize("case", METHODS)
def test_loading_gives_the_same_adapter_and_saving_it_again_the_same_bytes(case: str, tmp_path: Path) -> None:
    family, method, more = METHODS[case]
    model, batch = adapted(family, method, **more)
    dw.save(model, tmp_path / "one")
    fresh, _ = FAMILIES[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = dw.load(fresh, tmp_path / "one")
    assert tuned.method == method
    ours, theirs = tuned.tensors(), dw.tuned(model).tensors()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert [name for name, _ in tuned.named_parameters()] == [name for name, _ in dw.tuned(model).named_parameters()]
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    dw.save(tuned, tmp_path / "two")
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_detaching_a_loaded_adapter_gives_back_the_base(tmp_path: Path) -> None:
    model, _ = adapted("bert_classification", dw.LoRA(rank=2), also="head")
    dw.save(model, tmp_path)
    fresh, _ = FAMILIES["bert_classification"]()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    dw.load(fresh, tmp_path)
    assert any(isinstance(part, Trained) for part in dw.tuned(fresh).parts())
    dw.detach(fresh)
    after = fresh.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_bfloat16_base_takes_the_adapter_of_its_float32_copy_without_a_warning(tmp_path: Path) -> None:
    model, _ = adapted("llama", dw.LoRA(rank=2))
    dw.save(model, tmp_path)
    half = FAMILIES["llama"]()[0].bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = dw.load(half, tmp_path)
    assert {value.dtype for value in tuned.tensors().values()} == {torch.float32}


def test_another_base_is_warned_of_once_and_a_changed_base_is_another() -> None:
    one, _ = FAMILIES["llama"]()
    mark = fingerprint(one)
    assert mark == fingerprint(FAMILIES["llama"]()[0])
    with torch.no_grad():
        one.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    assert not same(mark, fingerprint(one))
    assert not same(mark, fingerprint(FAMILIES["qwen2"]()[0]))


@pytest.mark.filterwarnings("error")
def test_the_fingerprint_is_the_bases_whatever_is_attached_or_merged() -> None:
    model, _ = FAMILIES["llama"]()
    mark = fingerprint(model)
    dw.attach(model, dw.LoRA(rank=2), also="norm.final", seed=0)
    move(dw.tuned(model).parameters())
    assert fingerprint(model) == mark
    dw.merge(model)
    assert fingerprint(model) == mark


def test_a_mismatch_warns_and_loads(tmp_path: Path) -> None:
    model, _ = adapted("llama", dw.LoRA(rank=2))
    dw.save(model, tmp_path)
    other, _ = FAMILIES["llama"]()
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    with pytest.warns(UserWarning, match="trained on other weights") as caught:
        dw.load(other, tmp_path)
    assert len(caught) == 1


def test_several_adapters_are_saved_and_loaded_by_name(tmp_path: Path) -> None:
    model, batch = adapted("llama", dw.LoRA(rank=2))
    tuned = dw.attach(model, dw.IA3(), name="second", seed=0)
    move(tuned.parameters())
    dw.save(model, tmp_path / "a", name="default")
    dw.save(tuned, tmp_path / "b")
    fresh, _ = FAMILIES["llama"]()
    dw.load(fresh, tmp_path / "a")
    dw.load(fresh, tmp_path / "b", name="second")
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_saving_replaces_an_adapter_and_keeps_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "report.html").write_text("mine too")
    model, _ = adapted("mlp", dw.LoRA(rank=2, on="first"))
    dw.save(model, folder, format="peft")
    dw.save(model, folder)
    assert sorted(os.listdir(folder)) == ["adapter.json", "adapter.safetensors", "notes", "report.html"]
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_saving_where_one_stands_keeps_the_folder_itself(tmp_path: Path, monkeypatch: Any) -> None:
    model, _ = adapted("mlp", dw.LoRA(rank=2, on="first"))
    dw.save(model, tmp_path, format="peft")
    inode = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    dw.save(model, ".")
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", "adapter.safetensors"]
    assert tmp_path.stat().st_ino == inode
    dw.load(FAMILIES["mlp"]()[0], ".")


def test_what_only_training_needed_is_not_kept(tmp_path: Path) -> None:
    model, _ = adapted("llama", dw.PrefixTuning(length=2, hidden=4))
    dw.save(model, tmp_path / "training")
    tuned = dw.tuned(model)
    rules = tuned.run(1)
    rules.emit("finished")
    dw.save(model, tmp_path / "finished")
    assert any(name.startswith("@encoder.") for name in adapters.inspect(tmp_path / "training")["tensors"])
    assert not any("@" in name for name in adapters.inspect(tmp_path / "finished")["tensors"])


def test_a_failed_save_leaves_the_old_adapter_and_nothing_else(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "out"
    model, _ = adapted("mlp", dw.LoRA(rank=2, on="first"))
    dw.save(model, folder)
    old = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with torch.no_grad():
        next(iter(dw.tuned(model).parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        dw.save(model, folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    move(dw.tuned(model).parameters())
    with torch.no_grad():
        next(iter(dw.tuned(model).parameters())).fill_(1)
    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(OSError, match="No space"):
        dw.save(model, folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == old
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_process_killed_at_any_call_leaves_a_whole_adapter(exchange: bool, tmp_path: Path) -> None:
    """Every call to the file system of a second save is in turn made the last one of its process.

    What the process left goes with the next save.
    """
    script = """
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[4])  # alone: the package would import torch
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
target, stop, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
if not exchange:
    files.exchange = lambda one, other: False
def save(text):
    with files.Replacement(target, ("a", "b")) as folder:
        (folder / "a").write_text(text), (folder / "b").write_text(text)
save("old")
calls = 0
def last(event, args):
    global calls
    if event in ("os.rename", "open", "os.mkdir", "os.chmod", "shutil.rmtree", "os.rmdir", "os.remove", "os.link"):
        calls += 1
        if calls == stop:
            os._exit(9)
sys.addaudithook(last)
save("new")
"""
    seen = set()
    for stop in range(1, 90):
        folder = tmp_path / str(stop) / "out"
        command = [sys.executable, "-c", script, folder, str(stop), str(exchange), files.__file__]
        end = subprocess.run(command, check=False).returncode
        # Without an exchange there is a moment when the old adapter stands, whole, beside its place.
        place = folder if folder.exists() or exchange else next(folder.parent.glob(".out.*.old"))
        texts = {(place / name).read_text() for name in "ab"}
        assert len(texts) == 1, stop
        seen |= texts
        with files.Replacement(folder, ("a", "b")) as new:
            (new / "a").write_text("next")
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "next"}
        if end == 0:
            break
    assert end == 0 and seen == {"old", "new"}


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with files.Replacement(tmp_path / "out", ("a",)) as slow:
        (slow / "a").write_text("slow")
        with files.Replacement(tmp_path / "out", ("a",)) as quick:
            (quick / "a").write_text("quick")
        assert (tmp_path / "out" / "a").read_text() == "quick" and (slow / "a").read_text() == "slow"
    assert (tmp_path / "out" / "a").read_text() == "slow"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_set_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    aside, other = tmp_path / ".out.abcd_123.old", tmp_path / ".out.b.abcd_123.old"
    for folder in (aside, aside.with_suffix(".new"), other):
        folder.mkdir()
        (folder / "mine").write_text(folder.suffix)
    with files.Replacement(tmp_path / "out", ("a",)) as new:
        assert (tmp_path / "out" / "mine").read_text() == ".old" and not aside.with_suffix(".new").exists()
        (new / "a").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"], "of another target nothing is known"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "mine"}


def test_inspect_tells_what_is_there_without_reading_values(tmp_path: Path) -> None:
    model, _ = adapted("llama", dw.LoRA(rank=4))
    dw.save(model, tmp_path / "ours")
    dw.save(model, tmp_path / "peft", format="peft")
    ours, theirs = adapters.inspect(tmp_path / "ours"), adapters.inspect(tmp_path / "peft")
    assert (ours["format"], ours["method"], ours["settings"]["rank"]) == ("deltaworks", "lora", 4)
    assert (theirs["format"], theirs["method"], theirs["settings"]["r"]) == ("peft", "lora", 4)
    assert ours["values"] == theirs["values"] == dw.tuned(model).summary().trainable
    assert ours["base"]["fingerprint"] == fingerprint(model) and len(ours["parts"]) == 14
    assert json.dumps(ours) and ours["bytes"] > 4 * ours["values"]


def test_wrong_calls_say_what_is_wrong(tmp_path: Path) -> None:
    model, _ = FAMILIES["mlp"]()
    with pytest.raises(ValueError, match="no adapter"):
        dw.save(model, tmp_path / "out")
    dw.attach(model, dw.LoRA(rank=2, on="first"))
    with pytest.raises(ValueError, match="bin"):
        dw.save(model, tmp_path / "out", format="bin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'other'"):
        dw.save(model, tmp_path / "out", name="other")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        dw.save(model, tmp_path / "file")
    dw.save(model, tmp_path / "out")
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        dw.load(model, tmp_path / "out")
    dw.merge(model)
    with pytest.raises(ValueError, match="merged"):
        dw.load(model, tmp_path / "out", name="second")


def test_into_an_empty_folder_that_somebody_stands_in_everything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with files.Replacement(tmp_path, ()) as folder:
        (folder / "model.safetensors").write_text("weights")
    assert (tmp_path / "model.safetensors").read_text() == "weights"
