"""The studies that ship: each names what there is, says what the paper and what we found, and has its results page."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from deltaworks.nursery import BASES, DATA, PREFIX
from deltaworks.study.compare import compare
from deltaworks.study.engine import Runner
from deltaworks.study.spec import Study

FOLDER = Path(__file__).parents[2] / "studies"
TABLE = "nursery"  # the study behind `recommend`, which follows no paper
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != TABLE)
COMPARED = [path for path in FILES if not {"space", "trials"} & set(yaml.safe_load(path.read_text()))]
SMALL = ("unit_tests", "program_synthesis")


def test_there_are_studies_and_the_table_lists_all():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\((\w+)\.yaml\)", table))
    assert listed >= {path.stem for path in FILES}
    assert {path.stem for path in FILES} >= listed - {TABLE}


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_a_study_reads_and_names_what_there_is(path):
    study = Study.read(path)
    assert study.title and study.paper and study.expected and study.found
    assert re.search(r"\d{4}\.\d{4,5}", study.paper)
    cells = study.cells()
    for cell in cells:
        for key, known in (("base", BASES), ("data", DATA)):
            name = str(cell.keys[key])
            assert name.startswith(PREFIX), f"{name} is not on every machine"
            assert name.removeprefix(PREFIX).partition("/")[0] in known
        for entry in study.entries():
            study.recipe(cell, entry, 0)
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_has_its_page_of_results(path):
    folder = FOLDER / "results" / path.stem
    page = (folder / "report.md").read_text(encoding="utf-8")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["found"]
    assert " ".join(found.split()) in " ".join(page.split()), "the page was written before `found:`"
    pictures = re.findall(r"!\[.*?\]\((pictures/.*?)\)", page)
    assert pictures
    for picture in pictures:
        assert (folder / picture).stat().st_size > 1000
    assert not re.search(r"/(tmp|root|home|work)/", page)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 3 << 20, "a page of results is small"


@pytest.mark.parametrize("name", SMALL)
def test_a_study_runs(name, tmp_path):
    whole = Study.read(FOLDER / f"{name}.yaml")
    few = {"base": "nursery:decoder", "steps": 1, "samples": 2, "sample_length": 4, "batch_size": 2}
    few |= {"split": "validation", "limit": 8, "validation": 0.5}  # four of each
    small = dataclasses.replace(
        whole, axes={}, rate_axes=None, methods=whole.methods[:1], baselines=["base"], seeds=1, rates=0, domain="none",
        keys=whole.keys | few,
    )  # fmt: skip
    with Runner(tmp_path / "cache") as runner:
        found = compare(small, runner)
    assert [row["status"] for row in found.rows] == ["done", "done"]
    assert all(row["value"] is not None and row["metric"] == whole.metric for row in found.rows)
