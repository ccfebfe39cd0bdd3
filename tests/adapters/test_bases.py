"""An adapter goes between a base, its quantised copies, and the processes that hold it in parts."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import deltaworks as dw
from deltaworks.adapters import export
from deltaworks.adapters.fingerprint import fingerprint
from deltaworks.model.loading import load_base
from tests.adapters.adapted import adapted, move
from tests.families import FAMILIES


@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_an_adapter_of_a_quantised_base_loads_into_the_base_and_back(quantise: str, tmp_path: Path) -> None:
    model, batch = FAMILIES["llama"]()
    model.save_pretrained(tmp_path / "base")
    packed = load_base(str(tmp_path / "base"), quantize=quantise)
    tuned = dw.attach(packed, dw.LoRA(rank=2), seed=0)
    move(tuned.parameters())
    dw.save(tuned, tmp_path / "ours")
    dw.save(tuned, tmp_path / "peft", format="peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained on other weights")
        for folder in ("ours", "peft"):
            whole = load_base(str(tmp_path / "base"))
            dw.load(whole, tmp_path / folder)
            again = load_base(str(tmp_path / "base"), quantize=quantise)
            dw.load(again, tmp_path / folder)
            with torch.no_grad():
                assert torch.equal(again(**batch).logits, packed(**batch).logits)
            mine = dw.tuned(whole).tensors()
            assert all(torch.equal(mine[name], value) for name, value in tuned.tensors().items())


def test_a_quantised_base_is_told_from_another_by_its_shapes(tmp_path: Path) -> None:
    model, _ = FAMILIES["llama"]()
    model.save_pretrained(tmp_path)
    packed = load_base(str(tmp_path), quantize="nf4")
    shapes, values = fingerprint(packed).split(":")
    assert shapes == fingerprint(model).split(":")[0] and values == ""


def test_a_dense_change_of_a_quantised_layer_can_be_exported(tmp_path: Path) -> None:
    model, _ = FAMILIES["llama"]()
    model.save_pretrained(tmp_path / "base")
    packed = load_base(str(tmp_path / "base"), quantize="int8")
    tuned = dw.attach(packed, dw.DoRA(rank=2), seed=0)
    move(tuned.parameters())
    assert export(tuned, tmp_path / "out", rank=48).error < 1e-5


def _process(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, _ = adapted("llama", dw.LoRA(rank=2), also="norm.final")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    for format in ("deltaworks", "peft"):
        dw.save(model, Path(folder) / f"{format}{rank}", format=format)  # type: ignore[arg-type]
    dist.destroy_process_group()


def test_a_sharded_model_is_saved_whole_by_the_first_process(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    assert not (tmp_path / "deltaworks1").exists() and not (tmp_path / "peft1").exists()
    model, batch = adapted("llama", dw.LoRA(rank=2), also="norm.final")
    for format in ("deltaworks", "peft"):
        fresh: nn.Module = FAMILIES["llama"]()[0]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*trained on other weights")
            dw.load(fresh, tmp_path / f"{format}0")
        with torch.no_grad():
            assert torch.equal(fresh(**batch).logits, model(**batch).logits)
