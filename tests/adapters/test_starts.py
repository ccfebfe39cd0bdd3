"""A start that is subtracted is saved, made again when it is opened, or moved out of the base: the same outputs."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deltaworks as dw
from deltaworks import adapters
from deltaworks.adapters import files, starts
from deltaworks.cli import main
from deltaworks.model.loading import load_base
from tests.adapters.adapted import adapted, family, logits, move, refused
from tests.families import FAMILIES

RECOMPUTED: dict[str, tuple[str, Any]] = {
    "pissa under lora_plus": ("llama", dw.LoRAPlus(over=dw.PiSSA(rank=4))),
    "qr_lora": ("llama", dw.QRLoRA(rank=4, train="full")),
    "pissa": ("llama", dw.PiSSA(rank=4, alpha=6.0, overrides={"layers.0.*": {"rank": 2}})),
    "pissa by the exact SVD": ("gpt2", dw.PiSSA(rank=4, niter=None)),
    "pissa of experts": ("mixtral", dw.PiSSA(rank=4)),
    "pissa of fused layers": ("phi3", dw.PiSSA(rank=4, on=["attention.query", "mlp.up"])),
    "pissa of convolutions": ("cnn", dw.PiSSA(rank=2, on=[nn.Conv2d])),
    "olora": ("llama", dw.OLoRA(rank=4)),
    "nlora": ("llama", dw.NLoRA(rank=4, subtract_init=True, nystrom="pinv")),
    "loretta_rep": ("llama", dw.LoRETTARep(rank=4, train_rank=2)),
    "loretta_rep of experts": ("mixtral", dw.LoRETTARep(rank=4, train_rank=2)),
}
MOVED = RECOMPUTED | {
    "lora_ga": ("llama", dw.LoRAGA(rank=4)),
    "cola_chain": ("llama", dw.ColaChain(rank=4, links=2, dropout=0.1)),
}


def started(kind: str, method: Any) -> tuple[nn.Module, dict[str, Any]]:
    """An adapter away from its start, on a base without labels."""
    model, batch = family(kind)
    tuned = dw.attach(model, method, seed=3, data=[FAMILIES[kind]()[1]] if method.needs_data else None)
    move(tuned.parameters(), size=0.03)
    if method.slug == "cola_chain":  # as if a link were finished
        move([value for name, value in tuned.tensors().items() if "0" in name.rpartition(".")[2]], size=0.03)
    return model.eval(), batch


@pytest.fixture
def pissa(tmp_path: Path) -> Path:
    model, _ = adapted("mlp", dw.PiSSA(rank=2, on=["first", "second"]))
    return dw.save(model, tmp_path / "adapter", start="recompute")


@pytest.mark.parametrize("case", RECOMPUTED)
def test_a_start_that_was_left_out_is_made_again_bit_for_bit(case: str, tmp_path: Path) -> None:
    model, batch = started(*RECOMPUTED[case])
    dw.save(model, tmp_path / "values")
    rng = torch.get_rng_state()
    dw.save(model, tmp_path / "seed", start="recompute")
    fresh, _ = family(RECOMPUTED[case][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = dw.load(fresh, tmp_path / "seed")
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    ours, theirs = tuned.tensors(), dw.tuned(model).tensors()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [name for name, _ in tuned.named_parameters()] == [name for name, _ in dw.tuned(model).named_parameters()]
    for form, start in (("values", "values"), ("seed", "recompute")):
        dw.save(tuned, tmp_path / "again", start=start)  # type: ignore[arg-type]
        for name in os.listdir(tmp_path / form):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / form / name).read_bytes()


@pytest.mark.parametrize("case", RECOMPUTED)
def test_the_start_is_what_the_smaller_file_lacks(case: str, tmp_path: Path) -> None:
    model, _ = started(*RECOMPUTED[case])
    whole, small = (
        load_file(dw.save(model, tmp_path / start, start=start) / "adapter.safetensors")  # type: ignore[arg-type]
        for start in ("values", "recompute")
    )
    left_out = [value for part in dw.tuned(model).parts() for value in starts.start_of(part.tensors()).values()]
    assert len(whole) - len(small) == len(left_out) > 0
    sizes = [(tmp_path / start / "adapter.safetensors").stat().st_size for start in ("values", "recompute")]
    assert sizes[0] - sizes[1] >= sum(value.nbytes for value in left_out)


@pytest.mark.parametrize("case", MOVED)
def test_a_residual_and_its_plain_adapter_have_the_same_outputs(case: str, tmp_path: Path) -> None:
    kind, method = MOVED[case]
    model, batch = started(kind, method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = logits(model, batch)
    adapters.export_residual(dw.tuned(model), tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if kind == "cnn":
        base, _ = family(kind)
        base.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    else:
        base = load_base(str(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = dw.load(base, tmp_path / "out")
    assert not any(starts.start_of(part.tensors()) for part in tuned.parts())
    assert dw.tuned(model).summary().trainable == tuned.summary().trainable
    torch.testing.assert_close(logits(base, batch), wanted, atol=1e-5, rtol=1e-5)
    dw.detach(base)
    assert (logits(base, batch) - wanted).abs().max() > 1e-3
    if kind == "llama":
        with pytest.warns(UserWarning, match="trained on other weights"):
            dw.load(family(kind)[0], tmp_path / "out")


def test_a_head_beside_and_another_adapter_stay_out_of_the_residual(tmp_path: Path) -> None:
    model, batch = adapted("bert_classification", dw.PiSSA(rank=2, on="attention"), also="head")
    wanted = logits(model, batch)
    dw.attach(model, dw.LoRA(rank=2), name="second", seed=0)
    move(dw.tuned(model, "second").parameters())
    adapters.export_residual(model, tmp_path / "out", name="default")
    base = load_base(str(tmp_path / "out"), "sequence-classification", num_labels=model.config.num_labels)
    plain, _ = FAMILIES["bert_classification"]()
    assert torch.equal(base.classifier.weight, plain.classifier.weight)
    dw.load(base, tmp_path / "out")
    torch.testing.assert_close(logits(base, batch), wanted, atol=1e-5, rtol=1e-5)


def test_a_base_that_went_through_a_file_has_the_same_start(tmp_path: Path) -> None:
    model, batch = started("llama", dw.PiSSA(rank=4))
    dw.save(model, tmp_path / "adapter", start="recompute")
    family("llama")[0].save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    dw.attach(base, dw.LoRA(rank=2), name="other", seed=0)
    dw.load(base, tmp_path / "adapter")
    dw.activate(base, "default")
    assert torch.equal(logits(base, batch), logits(model, batch))


def test_a_start_without_random_numbers_needs_no_seed(tmp_path: Path) -> None:
    model = FAMILIES["mlp"]()[0]
    dw.attach(model, dw.OLoRA(rank=2, on="first"))
    dw.save(model, tmp_path, start="recompute")
    assert dw.load(FAMILIES["mlp"]()[0], tmp_path).state.adapters["default"].seed is None


def test_another_base_is_refused(pissa: Path) -> None:
    base = FAMILIES["mlp"]()[0]
    with torch.no_grad():
        base.second.weight[0, 0] += 1e-3
    assert "another on this base" in refused(base, pissa)
    assert "another on this base" in refused(FAMILIES["mlp"]()[0].bfloat16(), pissa)


def _changed(**settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["settings"].update(settings)


ENDLESS = r"(?:(?:[\w.]?){60}){60}[!?]"
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another seed": (lambda c: c.update(seed=1), "another on this base"),
    "a seed that is text": (lambda c: c.update(seed="0"), "'seed' cannot be"),
    "a seed that is true": (lambda c: c.update(seed=True), "'seed' cannot be"),
    "a seed beyond 64 bits": (lambda c: c.update(seed=1 << 64), "'seed' cannot be"),
    "a hash that is a number": (lambda c: c["parts"][0].update(start=7), "'start' cannot be int"),
    "another hash": (lambda c: c["parts"][0].update(start="0" * 64), "another on this base"),
    "the hash of nothing": (
        lambda c: (c.update(method="lora", settings={}), c["parts"][0].update(start=starts.digest({}))),
        "another on this base",
    ),
    "another rank": (_changed(rank=1), "another on this base"),
    "a method that measures": (lambda c: c.update(method="lora_ga", settings={"rank": 2}), "comes from data"),
    "a place elsewhere": (_changed(on="first"), "another on this base"),
    "iterations without end": (_changed(niter=1 << 60), "niter="),
    "iterations for days": (_changed(niter=1 << 15), "more than any start"),
    "iterations that a whole model may have": (_changed(niter=1500), "more than any start"),
    "a size as text, one method down": (
        lambda c: c.update(method="autopeft", settings={"methods": {"loretta_rep": {"rank": str(10**30 + 57)}}}),
        "no size",
    ),
    "iterations as text over another method": (
        lambda c: c.update(method="lora_plus", settings={"over": "pissa", "inner": {"rank": 2, "niter": str(1 << 60)}}),
        "no size",
    ),
    "a pattern of one of several methods": (
        lambda c: c.update(method="autopeft", settings={"methods": {"pissa": {"on": ENDLESS}}}),
        "timed out",
    ),
    "a pattern for inputs": (
        lambda c: c.update(method="ia3", settings={"on": ["first"], "inputs": ENDLESS}),
        "timed out",
    ),
    "a train that fills the memory": (
        lambda c: c.update(method="loretta_rep", settings={"rank": 8, "train_rank": 1 << 14, "on": "first"}),
        "more than any start",
    ),
    "a pattern made to search for ever": (_changed(on=[ENDLESS]), "timed out"),
    "an override made to search for ever": (
        _changed(overrides={ENDLESS: {"rank": 2}}),
        "timed out",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_file_says_of_a_start_is_verified(case: str, pissa: Path) -> None:
    change, reason = HOSTILE[case]
    config = json.loads((pissa / "adapter.json").read_text())
    change(config)
    (pissa / "adapter.json").write_text(json.dumps(config))
    assert reason in refused(FAMILIES["mlp"]()[0], pissa)


def test_a_file_cannot_hold_the_start_that_it_says_was_left_out(tmp_path: Path) -> None:
    model, _ = adapted("mlp", dw.PiSSA(rank=2, on=["first"]))
    dw.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter.json").read_text())
    config["parts"][0]["start"] = "0" * 64
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    assert "was left out" in refused(FAMILIES["mlp"]()[0], tmp_path)


def test_what_cannot_be_made_again_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    def asked(method: Any, change: Callable[[dw.Tuned], Any] = lambda tuned: None, seed: int | None = 0) -> str:
        model, batch = FAMILIES["mlp"]()
        tuned = dw.attach(model, method, seed=seed, data=[batch] if method.needs_data else None)
        change(tuned)
        with pytest.raises(ValueError) as caught:
            dw.save(tuned, tmp_path / "out", start="recompute")
        assert "\n" not in str(caught.value) and not os.listdir(tmp_path)
        return str(caught.value)

    def elsewhere(tuned: dw.Tuned) -> None:
        with torch.no_grad():
            next(value for name, value in tuned.tensors().items() if name.endswith("b0")).add_(1)

    def base(tuned: dw.Tuned) -> None:
        with torch.no_grad():
            tuned.model.get_parameter("first.weight").add_(1)

    pissa = dw.PiSSA(rank=2, on="first")
    assert "without a seed" in asked(pissa, seed=None)
    assert "seed=0 gives another" in asked(pissa, elsewhere) and "seed=0 gives another" in asked(pissa, base)
    assert "comes from data" in asked(dw.LoRAGA(rank=2, on="first"))
    assert "subtracts a start" in asked(dw.LoRA(rank=2, on="first"))
    model, _ = adapted("mlp", pissa)
    for wrong in ({"start": "no"}, {"start": "recompute", "format": "peft"}):
        with pytest.raises(ValueError, match="is not known"):
            dw.save(model, tmp_path / "out", **wrong)  # type: ignore[arg-type]
    assert not os.listdir(tmp_path)


def test_a_merged_adapter_can_leave_its_start_out(tmp_path: Path) -> None:
    model, batch = adapted("llama", dw.PiSSA(rank=2))
    dw.merge(model)
    dw.save(model, tmp_path, start="recompute")
    fresh, _ = FAMILIES["llama"]()
    dw.load(fresh, tmp_path)
    dw.unmerge(model)
    assert torch.equal(logits(fresh, batch), logits(model, batch))


def test_a_residual_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def asked(model: nn.Module) -> str:
        with pytest.raises(ValueError) as caught:
            adapters.export_residual(model, tmp_path / "out")
        assert "\n" not in str(caught.value) and not os.listdir(tmp_path)
        return str(caught.value)

    assert "own residual" in asked(adapted("mlp", dw.LoRA(rank=2, on="first"))[0])
    model, _ = adapted("mlp", dw.PiSSA(rank=2, on="first"))
    assert "dw.unmerge" in asked(dw.merge(model))
    dw.unmerge(model)
    assert "is tied" in asked(adapted("qwen2", dw.PiSSA(rank=2, on="embed_tokens"))[0])
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(files, "_flush", full)
        with pytest.raises(OSError, match="No space"):
            adapters.export_residual(model, tmp_path / "out")
    assert not os.listdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        adapters.export_residual(model, tmp_path / "out")
    assert not os.listdir(tmp_path / "out")


def test_peft_takes_the_start_as_a_lora_of_twice_the_rank_and_the_same_scale(tmp_path: Path) -> None:
    for slug, method in {"olora": dw.OLoRA(rank=4, alpha=6.0), "lora_ga": dw.LoRAGA(rank=4, alpha=6.0)}.items():
        model, batch = started("llama", method)
        scale = next(dw.tuned(model).parts()).scale
        config = json.loads((dw.save(model, tmp_path / slug, format="peft") / "adapter_config.json").read_text())
        assert config["r"] == 8 and config["use_rslora"] is False
        assert config["lora_alpha"] == pytest.approx(8 * scale)
        ours, _ = family("llama")
        dw.load(ours, tmp_path / slug)
        torch.testing.assert_close(logits(ours, batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_the_command_line_leaves_a_start_out_and_moves_it(tmp_path: Path) -> None:
    family("llama")[0].save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"))
    move(dw.attach(model, dw.PiSSA(rank=4), seed=3).parameters())
    dw.save(model, tmp_path / "adapter")
    batch = family("llama")[1]

    def export(*options: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["export", str(tmp_path / "adapter"), "--output", *options])
        return int(end.value.code or 0)

    assert export(str(tmp_path / "half"), "--format", "deltaworks", "--start", "recompute") == 0
    assert export(str(tmp_path / "moved"), "--format", "residual") == 0
    for base, adapter in (("base", "half"), ("moved", "moved")):
        opened = load_base(str(tmp_path / base))
        dw.load(opened, tmp_path / adapter)
        torch.testing.assert_close(logits(opened, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
    assert all("a0" not in name for name in load_file(tmp_path / "half" / "adapter.safetensors"))
    assert export(str(tmp_path / "no"), "--start", "recompute") != 0 and not (tmp_path / "no").exists()
