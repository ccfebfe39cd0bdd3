"""Every benchmark's worker measures something on the smallest setting, and its table and picture show it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bench import (
    finished,
    finished_worker,
    growth,
    growth_worker,
    measure,
    picture,
    run,
    run_worker,
    shapes,
    step,
    step_worker,
)
from bench.measure import heading, machine, ratio

SIZE = {"hidden": 32, "inner": 64, "layers": 1, "heads": 2, "kv_heads": 2, "vocabulary": 128}
LINEAR = growth_worker.LINEAR


def finite(figures: dict[str, Any]) -> bool:
    return all(math.isfinite(value) and value >= 0 for value in figures.values())


def record(**given: Any) -> dict[str, Any]:
    return {"command": "python -m bench", "machine": machine(), "threads": 1, "repeats": 1, "shape": "tiny", **given}


def test_an_interrupt_keeps_the_complete_repeats() -> None:
    def until(last: int) -> dict[str, list[dict[str, Any]]]:
        taken: list[int] = []

        def take(*_: Any) -> dict[str, Any]:
            if len(taken) == last:
                raise KeyboardInterrupt
            taken.append(0)
            return {"seconds": 1.0}

        return measure.interleaved("", {"base": {}, "a": {}, "b": {}}, 4, 1, take, ("base",), every=1)

    found = until(10)  # a repeat measures the base, a, the base again, b
    assert {name: [one["turn"] for one in mine] for name, mine in found.items()} == {
        "base": [0, 2, 4, 6], "a": [1, 5], "b": [3, 7],
    }  # fmt: skip
    assert measure.complete(found) == 2
    assert measure.complete(found | {"c": [{"error": "of some kind"}]}) == 2
    with pytest.raises(KeyboardInterrupt):
        until(3)


@pytest.mark.parametrize("side", ["frozen", "full", "ours", "peft", "lycoris"])
def test_a_step(side: str) -> None:
    settings = SIZE | {"side": side, "steps": 1, "batch": 2, "tokens": 8, "dtype": "bfloat16"}
    settings |= {"method": "lora", "settings": {"rank": 2}}
    if side == "peft":
        settings |= {"config": "LoraConfig", "settings": {"r": 2, "target_modules": LINEAR}}
    if side == "lycoris":
        pytest.importorskip("lycoris")
        settings |= {"targets": LINEAR, "settings": {"network_module": "loha", "lora_dim": 2}}
    figures = step_worker.measure(settings)
    assert finite(figures) and figures["seconds"] > 0 and figures["saved_bytes"] > 0


def test_lora_on_several_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", {shape: SIZE for shape, _, _ in shapes.CASES})
    monkeypatch.setattr(shapes, "CASES", (("small", 2, 8), ("wide", 1, 8)))
    label, settings = next(iter(shapes.cases(quick=True).items()))
    sides = {name: one for name, one in step.sides(settings, ["lora"]).items() if name in shapes.SIDES}
    assert len(sides) == len(shapes.SIDES)
    rows = step.rows(measure.interleaved("", sides, 1, 1, lambda _, side, __: step_worker.measure(dict(side))))
    found = record(rows={label: rows})
    assert shapes.table(found).count(f"| {label}") == 2
    picture.shapes(found, tmp_path / "shapes.png")
    assert (tmp_path / "shapes.png").stat().st_size > 10_000


def test_references_are_measured_again_and_the_nearest_counts() -> None:
    seconds = iter(range(100))
    sides = {"frozen": {}, "a": {}, "b": {}, "c": {}}
    samples = measure.interleaved("", sides, 2, 1, lambda *_: {"seconds": next(seconds)}, ("frozen",), every=2)
    taken = {name: [one["seconds"] for one in found] for name, found in samples.items()}
    assert taken == {"frozen": [0, 3, 5, 8, 10], "a": [1, 6], "b": [2, 7], "c": [4, 9]}
    near = {name: [one["seconds"] for one in measure.nearest(samples[name], samples["frozen"])] for name in "abc"}
    assert near == {"a": [0, 5], "b": [3, 8], "c": [3, 8]}


@pytest.mark.parametrize("side", ["ours", "peft"])
@pytest.mark.parametrize("other", [{}, {"mixed": True}, {"head": True}], ids=["stacked", "mixed", "head"])
def test_growth(side: str, other: dict[str, bool]) -> None:
    settings = growth.SIZE | SIZE | {"side": side, "adapters": 2, "batch": 2, "tokens": 8, "rank": 2, "steps": 1}
    figures = growth_worker.measure(settings | {"dtype": "bfloat16"} | other)
    assert finite(figures) and figures["seconds"] > 0
    assert ("saved_bytes" in figures) == ("mixed" not in other)


def test_a_run_of_both_sides_learns_the_same_tokens(tmp_path: Path) -> None:
    files = run.rows_to(tmp_path, 4, 1, seed=0)
    settings = {
        "base": run.base_in(tmp_path, "nursery"), "data": files["train"], "validation": files["held_out"],
        "batch_size": 2, "max_length": 64, "rank": 2, "dtype": "float32", "lr": 1e-3, "packing": False,
        "pad_to_multiple_of": None, "matched": True, "liger": False, "seed": 0, "threads": 1, "folder": str(tmp_path),
    }  # fmt: skip
    ours, theirs = (run_worker.measure(settings | {"side": side}) for side in ("ours", "trl"))
    assert finite(ours) and finite(theirs)
    for key in ("supervised", "trainable", "steps"):
        assert ours[key] == theirs[key] > 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
    row = {"ratios": {key: ratio([ours], [theirs], key) for key in run.FIGURES}}
    row |= {side: {key: taken.get(key) for key in run.FIGURES} for side, taken in (("ours", ours), ("trl", theirs))}
    found = record(rows={"padded": row, "liger": {"missing": "not measured"}}, goals=run.GOALS)
    assert "not measured" in run.table(found)
    picture.run(found, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_finished_adapters(tmp_path: Path) -> None:
    settings = finished.SHAPES["tiny"] | {"rank": 2, "merged_layers": 1}
    taken = {side: [finished_worker.measure(settings | {"side": side})] for side in ("ours", "peft")}
    assert all(finite(side[0]) for side in taken.values())
    rows = finished.rows_of(taken)
    assert all(row[side]["seconds"] > 0 for row in rows.values() for side in taken)
    found = record(rows=rows, settings=settings, samples=taken)
    assert all(f"| {what} |" in finished.table(found) for what in finished.WHAT)
    picture.finished(found, tmp_path / "finished.png")
    assert (tmp_path / "finished.png").stat().st_size > 10_000


def test_growth_is_drawn_where_one_side_failed(tmp_path: Path) -> None:
    found = growth.points(["rank"], quick=True)
    mine = [{"seconds": 1.0, "saved_bytes": 2e6, "resident_above_base": 3e6}]
    samples = {f"{side} {growth.label(point)}": mine for side in ("ours",) for point in found["rank"].values()}
    samples |= {f"peft {growth.label(point)}": [{"error": "no"}] for point in found["rank"].values()}
    whole = record(rows=growth.rows_of(found, samples), settings=growth.SIZE | {"dtype": "bfloat16"})
    assert "| no |" in growth.table(whole)
    picture.growth(whole, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_a_table_says_where_and_how_it_was_measured() -> None:
    text = "\n".join(heading("What", record()))
    assert "torch 2" in text and "python -m bench" in text and "20" in text
