"""Whatever the method: its artifact is the adapter bit for bit; PEFT's format and the export are exact or refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.adapters import export
from tests.adapters.adapted import move
from tests.families import FAMILIES

METHODS = dw.methods()


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)  # for what draws when it runs
    return model.eval()(**batch).logits


@pytest.fixture(params=METHODS)
def subject(request: Any) -> tuple[nn.Module, dict[str, Any], str]:
    for family in ("llama", "vit", "bert"):
        if family in METHODS[request.param].refuses:
            continue
        model, batch = FAMILIES[family]()
        method = METHODS[request.param]()
        tuned = dw.attach(model, method, seed=0, data=[batch] if method.needs_data else None)
        move(tuned.parameters(), size=0.05)
        return model, batch, family
    pytest.skip("for none of these bases")


@pytest.mark.filterwarnings("ignore")
def test_every_format_keeps_a_method_exactly_or_says_that_it_cannot(subject: Any, tmp_path: Path) -> None:
    model, batch, family = subject
    wanted = logits(model, batch)
    dw.save(model, tmp_path / "ours")
    fresh, _ = FAMILIES[family]()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained on other weights")
        loaded = dw.load(fresh, tmp_path / "ours")
    assert torch.equal(logits(fresh, batch), wanted) and loaded.method == dw.tuned(model).method
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in dw.tuned(model).named_parameters()]
    for held in (*dw.tuned(model).parameters(), *loaded.parameters()):
        assert held.is_contiguous() and held.data_ptr() % 64 == 0, "where a tensor lies may decide how products round"
    dw.save(fresh, tmp_path / "again")
    for file in (tmp_path / "ours").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    for format in ("peft", "export"):
        try:
            if format == "peft":
                dw.save(model, tmp_path / format, format=format)
            else:
                export(dw.tuned(model), tmp_path / format, rank=64)
        except ValueError as error:
            assert "\n" not in str(error) and dw.tuned(model).method.slug in str(error)
            continue
        other, _ = FAMILIES[family]()
        dw.load(other, tmp_path / format)
        scale = wanted.abs().max().clamp_min(1)
        torch.testing.assert_close(logits(other, batch) / scale, wanted / scale, atol=2e-4, rtol=1e-3)
