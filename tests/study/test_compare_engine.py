"""Trials are run once, known by what their result depends on, and none takes a study with it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from deltaworks.study import trial as trials
from deltaworks.study.engine import Runner
from deltaworks.study.trial import Trial, code, mark
from deltaworks.training import Recipe

from .work import recipe

LEARNED = ("figures", "before", "losses", "evaluations")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def learned(row: dict[str, Any]) -> dict[str, Any]:
    assert row["status"] == "done", row["error"]
    return {name: row[name] for name in LEARNED}


def test_a_trial_is_known_by_recipe_data_and_what_is_measured(folder: Path, tmp_path: Path) -> None:
    one = Trial(recipe=recipe(folder, method="lora"))
    same = Trial(recipe=recipe(folder, method="lora", output="elsewhere", save_every=1), labels={"name": "mine"})
    assert one.key() == same.key()
    copied = tmp_path / "copy.jsonl"
    shutil.copy(one.recipe.data, copied)
    moved = Trial(recipe=recipe(folder, method="lora", data=str(copied)))
    assert moved.content()["data"] == one.content()["data"]
    copied.write_text(copied.read_text().replace("w1", "w2"))
    others = [
        moved,
        Trial(recipe=recipe(folder, method="lora", settings={"rank": 3})),
        Trial(recipe=recipe(folder, method="lora", seed=1)),
        Trial(recipe=recipe(folder, method="ia3")),
        dataclasses.replace(one, half="choosing"),
        dataclasses.replace(one, domain=one.recipe.data),
        dataclasses.replace(one, kind="base"),
        dataclasses.replace(one, kind="context", context=2),
    ]
    assert len({one.key(), *(other.key() for other in others)}) == len(others) + 1


def test_the_base_untouched_is_the_same_whatever_method_is_named(folder: Path) -> None:
    one, other = (Trial(recipe=recipe(folder, method=method), kind="base") for method in ("lora", "ia3"))
    assert one.key() == other.key()


def test_a_method_does_not_grow_old_with_another_page() -> None:
    reached = trials._reached({"deltaworks.training.tune", "deltaworks.methods.lowrank.lora"}, "deltaworks")
    assert {"deltaworks.core.graft", "deltaworks.core.operators.low_rank", "deltaworks.data.packing"} <= set(reached)
    assert not {"deltaworks.methods.lowrank.dora", "deltaworks.cli.tune", "deltaworks.study.pages"} & set(reached)
    assert code("deltaworks.methods.lowrank.lora") != code("deltaworks.methods.lowrank.dora")


@pytest.mark.parametrize(
    ("method", "settings", "inner"),
    [
        ("capaboost", {"over": "vera"}, "vera"),
        ("mezo", {"over": "vera"}, "vera"),
        ("autopeft", {"methods": {"vera": {}}}, "vera"),
        ("rosa", {}, "lora"),
    ],
)
def test_a_method_grows_old_with_the_pages_that_it_is_made_of(method: str, settings: dict, inner: str) -> None:
    pages = trials._pages(Recipe.of({"method": method, "settings": settings}).made())
    assert {page.rpartition(".")[2] for page in pages} == {method, inner}


def test_a_mark_changes_with_the_content_of_small_and_large_files(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trials, "PIECES", 4)
    monkeypatch.setattr(trials, "PIECE", 8)
    for bound in (1 << 20, 16):
        monkeypatch.setattr(trials, "WHOLE_FILE", bound)
        (tmp_path / str(bound)).mkdir()
        file = tmp_path / str(bound) / "weights"
        file.write_bytes(b"0" * 64)
        before = mark(str(file)), mark(str(file.parent))
        file.write_bytes(b"0" * 63 + b"1")
        os.utime(file, ns=(1, 1))
        assert not {mark(str(file)), mark(str(file.parent))} & set(before)


def test_trials_are_run_once_and_failures_are_rows(folder: Path, tmp_path: Path) -> None:
    good = Trial(recipe=recipe(folder, method="lora"))
    refused = Trial(recipe=recipe(folder, settings={"on": "nothing"}))
    missing = Trial(recipe=recipe(folder, base=str(folder / "none")))
    base, context = (Trial(recipe=recipe(folder), kind=kind, context=2) for kind in ("base", "context"))  # type: ignore[arg-type]
    asked = [good, refused, Trial(recipe=good.recipe), missing, base, context]
    with Runner(tmp_path, jobs=2) as runner:
        rows = runner.run(asked)
        again = runner.run(asked)
    assert [row["status"] for row in rows] == ["done", "failed", "done", "failed", "done", "done"]
    assert rows[0] == rows[2] and not any(row["cached"] for row in rows)
    assert "'nothing' matches nothing" in rows[1]["error"] and "\n" not in rows[1]["error"]
    assert "no such folder" in rows[3]["error"]
    # What is not there may come; all else is known.
    assert [row["cached"] for row in again] == [True, True, True, False, True, True]
    assert learned(again[0]) == learned(rows[0])
    row = rows[0]
    assert row["trainable"] > 0 and row["stored_bytes"] == 4 * row["trainable"] and row["step_seconds"] > 0
    assert row["step_flops"] > row["example_flops"] > 0 and len(row["losses"]) == 3
    assert rows[4]["figures"]["loss"] == pytest.approx(row["before"]["loss"], rel=1e-5)
    # The base reads no more than it does under a method; examples in the prompt are read, too.
    assert rows[4]["example_flops"] <= row["example_flops"]
    assert rows[5]["example_flops"] > 1.5 * rows[4]["example_flops"]


def test_halves_share_no_row_and_together_are_the_whole(folder: Path, tmp_path: Path) -> None:
    halves: list[Any] = [None, "choosing", "reporting"]
    with Runner(tmp_path, jobs=2) as runner:
        rows = runner.run([Trial(recipe=recipe(folder), kind="base", half=half) for half in halves])
    whole, one, other = rows
    assert one["held_out"] + other["held_out"] == whole["held_out"] == 6
    assert one["figures"]["loss"] != other["figures"]["loss"]
    # Every row has as many targets, so the mean over all is that of the halves' means.
    both = (one["figures"]["loss"] + other["figures"]["loss"]) / 2
    assert both == pytest.approx(whole["figures"]["loss"], rel=0.02)


def test_a_killed_trial_is_a_failed_row_and_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    trial = Trial(recipe=recipe(folder, steps=6, save_every=2, evaluate_every=3))
    heard: list[tuple[str, Any]] = []

    def kill(_: Trial, event: str, figures: dict[str, Any]) -> None:
        if event == "step" and figures["step"] == 5:
            (child,) = multiprocessing.active_children()
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    with Runner(tmp_path / "killed") as runner:
        (row,) = runner.run([trial], kill)
        assert row["status"] == "failed" and "SIGKILL" in row["error"]
        (row,) = runner.run([trial], lambda _, event, figures: heard.append((event, figures.get("step"))))
    assert ("resumed", 4) in heard and not row["cached"]
    with Runner(tmp_path / "whole") as runner:
        (whole,) = runner.run([trial])
    assert learned(row) == learned(whole)


def test_a_trial_can_be_stopped_and_is_not_taken_for_a_result(folder: Path, tmp_path: Path) -> None:
    trial = Trial(recipe=recipe(folder, steps=40))
    with Runner(tmp_path) as runner:
        (row,) = runner.run([trial], lambda _, event, figures: event == "step" and figures["step"] >= 2)
    assert row["status"] == "stopped"
    assert not list(tmp_path.glob("*/row.json"))


def test_two_workers_of_a_local_ray_give_the_same_rows(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'deltaworks[ray]'")
    asked = [Trial(recipe=recipe(folder, method="lora")), Trial(recipe=recipe(folder, settings={"on": "nothing"}))]
    with Runner(tmp_path / "here") as runner:
        here = runner.run(asked)
    with Runner(tmp_path / "ray", jobs=2, ray="local") as runner:
        there = runner.run(asked)
        assert json.loads((tmp_path / "ray" / there[0]["key"] / "row.json").read_text())["status"] == "done"
        assert [row["cached"] for row in runner.run(asked)] == [True, True]
    assert learned(there[0]) == learned(here[0])
    assert there[1]["error"] == here[1]["error"]
