"""`deltaworks compare` and `recommend` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltaworks.cli import main
from tests.study.work import places


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0  # type: ignore[return-value]


def refused(capsys: Any, *arguments: Any) -> str:
    capsys.readouterr()
    assert run(*arguments) != 0
    said = capsys.readouterr().err.strip()
    assert said.startswith("deltaworks: ") and "\n" not in said, said
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def ours(folder: Path) -> list[Any]:
    given = places(folder)
    quick = ["--steps", 2, "--batch-size", 4, "--samples", 0, "--validation", 0.2, "--device", "cpu", "--jobs", 2]
    options = ["--methods", "lora,ia3", "--seeds", "2", "--rates", "0", "--budget", "params=3000"]
    return ["compare", "--base", given["base"], "--data", given["data"], *quick, *options, "--cache", folder / "cache"]


def test_compare_shows_a_person_what_came_out_and_machines_json(ours: list[Any], folder: Path, capsys: Any) -> None:
    assert run(*ours, "--output", folder / "one") == 0
    said = capsys.readouterr().out
    for word in (
        "lora",
        "full",
        "in-context",
        "base",
        "size",
        "rank 3",
        "beats others",
        "10 run, 0 known",
        "report.html",
    ):
        assert word in said, word
    for name in ("report.html", "report.md", "results.parquet", "summary.json", "study.yaml"):
        assert (folder / "one" / name).is_file()
    assert run(*ours, "--output", folder / "two", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["cached"]) == (0, 10) and told["cells"][0]["methods"]

    assert run("recommend", folder / "one", "--max-params", "100k", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in listed["recommended"]} == {"lora", "ia3", "full"}
    assert run("recommend", folder / "one", "--max-params", "3500", "--mergeable") == 0
    said = capsys.readouterr().out
    assert "1. " in said and "left out: full" in said
    assert "--max-step" in refused(capsys, "recommend", folder / "one", "--base", "x", "--max-step", "1s")


def test_recommend_has_a_table_of_its_own(capsys: Any) -> None:
    assert run("recommend", "--max-params", "1e5", "--mergeable", "--top", "2") == 0
    said = capsys.readouterr().out
    assert "1. " in said and "2. " in said and "3. " not in said and "nursery" in said
    assert "no size" in refused(capsys, "recommend", "--memory", "lots")
    assert "holds no finished study" in refused(capsys, "recommend", "nowhere")
    assert "it has" in refused(capsys, "recommend", "--task", "seq2seq")


def test_compare_says_what_is_wrong(ours: list[Any], folder: Path, capsys: Any) -> None:
    assert "did you mean" in refused(capsys, *ours, "--methods", "lroa")
    assert "write params=N" in refused(capsys, *ours, "--budget", "size")
    assert "--seeds many" in refused(capsys, *ours, "--seeds", "many")
    assert "jobs=0" in refused(capsys, *ours, "--jobs", "0")
    path = folder / "study.yaml"
    path.write_text("methods: [lora]\nstesp: 3\n")
    assert "did you mean steps" in refused(capsys, "compare", path)
    path.write_text("- lora\n")
    assert "is not a study" in refused(capsys, "compare", path)
