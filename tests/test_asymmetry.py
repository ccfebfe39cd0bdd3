"""The study of which factor trains: its measures, and that it runs what is missing and no more."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.delitem(sys.modules, "budget", raising=False)
    spec = importlib.util.spec_from_file_location("asymmetry", DOCS / "asymmetry.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "budget")
    return module


def test_similarity_is_of_the_spaces_and_not_of_their_bases(study: ModuleType) -> None:
    one = torch.eye(6, dtype=torch.float64)
    turned = torch.tensor([[2.0, 1.0], [0.0, -3.0]], dtype=torch.float64) @ one[:2]
    assert study.canonical([one[:2]], [turned]) == pytest.approx(1)
    assert study.canonical([one[:2]], [one[2:4]]) == pytest.approx(0)
    assert study.canonical([one[:2], one[:2]], [one[1:3], turned]) == pytest.approx((0.5 + 1) / 2)
    assert study.cosine([one], [-one]) == pytest.approx(-1)


def test_the_study_runs_what_is_missing_and_a_frozen_factor_is_its_start(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Toy(study.Task):
        def __init__(self, name: str) -> None:
            torch.manual_seed(0)
            sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            self.model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))
            rows = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(len(name)))
            self.train = list(rows)
            self.collate = lambda some: {"input_ids": torch.stack(some), "labels": torch.stack(some)}
            self.seen, self.held_out = [self.collate(list(rows[:4]))], [self.collate(list(rows[4:]))]

    arms = ("b rand", "both rand", "a svd")
    for name, value in {
        "Task": Toy, "RECORD": tmp_path / "a.json", "PAGE": tmp_path / "a.md", "SEEDS": 2, "STEPS": 2, "ORDERS": 2,
        "RANK": 2, "RATES": (0.1,), "ARMS": {arm: study.ARMS[arm] for arm in arms}, "COMPARED": arms,
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    ran, run = [], study.run
    monkeypatch.setattr(study, "run", lambda arm, *rest: ran.append(arm) or run(arm, *rest))

    def call(*options: str) -> set[str]:
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["asymmetry.py", *options])
        study.main()
        return set(ran)

    assert call() == set(arms)
    alike = {arm: measures["canonical"] for arm, measures in json.loads(study.RECORD.read_text())["alike"].items()}
    frozen = alike["b rand"]["A"]
    assert {*frozen["own"], *frozen["order"], *frozen["task"]} == {1.0} and max(frozen["start"]) < 1
    assert max(alike["both rand"]["A"]["own"]) < 1 and "own" not in alike["both rand"]["B"]
    assert "start" not in alike["a svd"]["B"]
    page = study.PAGE.read_text()
    assert all(f"| {trains} | {start} |" in page for trains, start in (("B", "rand"), ("both", "rand"), ("A", "svd")))
    assert call() == set() and study.PAGE.read_text() == page
    assert call("--again", "b rand") == {"b rand"} and study.PAGE.read_text() == page
