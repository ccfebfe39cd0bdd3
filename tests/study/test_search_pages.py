"""A search's page in a browser, its pictures and its Markdown; intervals over groups."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltaworks.study.fairness import auc, merits, spread
from deltaworks.study.page_parts import document
from deltaworks.study.pareto import Found
from deltaworks.study.search import search
from deltaworks.study.search_pages import markdown, save, sentences, tell
from deltaworks.study.trial import Trial

from .browser import Browser
from .searching import Played, size_of, wanted

HOSTILE = "</script><script>window.taken = 1</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """A search whose figure is better the more trains, but for some noise; one of its trials fails."""
    chance = random.Random(0)

    def row(trial: Trial) -> dict[str, Any]:
        if "number" in trial.labels and trial.labels["number"] == 3 and trial.half == "choosing":
            return {"status": "failed", "error": HOSTILE}
        return {"curve": [3.0 / (1 + size_of(trial)) * chance.uniform(0.8, 1.2)]}

    given = wanted(folder, title=f"A & B {HOSTILE}", trials=24, startup=12, full=2)
    return search(given, Played(row), folder / "plain")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fair(folder: Path) -> Found:
    """A search for fairness between two groups."""
    chance = random.Random(0)

    def row(trial: Trial) -> dict[str, Any]:
        old, young = chance.uniform(0.5, 0.7), chance.uniform(0.7, 0.9)
        figures = {"group.old.accuracy": old, "group.young.accuracy": young, "worst_accuracy": min(old, young)}
        figures |= {"group.old.rows": 20.0, "group.young.rows": 40.0, "gap_accuracy": young - old}
        for name in ("group.old.accuracy", "group.young.accuracy", "worst_accuracy"):
            figures |= {f"{name}.low": figures[name] - 0.1, f"{name}.high": figures[name] + 0.1}
        return {"figures": figures}

    given = wanted(folder, fair="age", metric="worst_accuracy", cost="none", trials=10, full=1)
    return search(given, Played(row), folder / "fair")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def output(folder: Path, found: Found, fair: Found) -> Path:
    save(found, folder / "plain")
    save(fair, folder / "fair")
    return folder


# What is said


def test_what_is_told_is_what_was_found(found: Found) -> None:
    told = tell(found)
    assert [one["trial"] for one in told["best"]] == [one.number for one in found.best]
    assert all(one["full"]["mean"] == best.full_value for one, best in zip(told["best"], found.best, strict=True))
    assert all(one["full"]["runs"] == 2 for one in told["best"])
    assert sum(one["share"] for one in told["importance"]) == pytest.approx(1)
    by_name = {choice["name"]: choice for choice in told["choices"]}
    assert set(by_name) == {"pfeiffer", "lora", "block 0", "block 1"}
    for place, best in enumerate(found.best):
        size = best.configuration["size.lora"]
        assert by_name["lora"]["values"][place] == ["no", "rank 1", "rank 4"][size]
        assert by_name["block 1"]["values"][place] == ("yes" if best.configuration["layer.1"] else "no")
    tried = sum(one["configuration"]["size.lora"] > 0 for one in found.trials) / len(found.trials)
    assert by_name["lora"]["tried"] == pytest.approx(tried)
    assert any("24 configurations were tried: 23 done, 1 failed" in one for one in sentences(told))


def test_a_figure_of_nought_is_a_figure(folder: Path) -> None:
    given = wanted(folder, trials=2, full=1)
    found = search(given, Played(lambda _: {"curve": [0.0]}), folder / "nought")  # type: ignore[arg-type]
    assert [one["full"]["mean"] for one in tell(found)["best"]] == [0.0] * len(found.best)
    assert "| 0 | 0 |" in markdown(tell(found), [])


def test_what_decides_alone_is_what_matters(folder: Path) -> None:
    def row(trial: Trial) -> dict[str, Any]:
        return {"curve": [0.1 if "lora" in json.dumps(trial.recipe.settings) + trial.recipe.method else 1.0]}

    found = search(wanted(folder, trials=20, startup=20), Played(row), folder / "one")  # type: ignore[arg-type]
    assert max(found.importance, key=lambda name: found.importance[name]) == "size.lora"
    few = search(wanted(folder, trials=6), Played(), folder / "few")  # type: ignore[arg-type]
    assert few.importance == {}, "six trials do not say"
    assert json.loads((folder / "one" / "results.json").read_text())["importance"] == found.importance


def test_groups_are_told_with_their_intervals(fair: Found) -> None:
    groups = tell(fair)["groups"]
    assert (groups["column"], groups["figure"], groups["names"]) == ("age", "accuracy", {"old": 20, "young": 40})
    figures = fair.best[0].full[0]["figures"]
    for one in groups["shown"]:
        name = "worst_accuracy" if one["group"] is None else f"group.{one['group']}.accuracy"
        assert [one[end] for end in ("value", "low", "high")] == [figures[name + end] for end in ("", ".low", ".high")]
    assert fair.trials[0]["groups"]["group.old.rows"] == 20
    assert any(one.startswith("Worst group of recipe 01: old") for one in sentences(tell(fair)))


# Intervals


def test_an_interval_over_rows_is_where_the_figure_of_other_rows_lies() -> None:
    """Of a hundred samples of rows from a known distribution, about 95 intervals hold its accuracy."""
    chance = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        truth = torch.from_numpy(chance.integers(2, size=60))
        right = torch.from_numpy(chance.random(60) < 0.7)
        said = torch.where(right, truth, 1 - truth)
        chances = torch.nn.functional.one_hot(said, 2).double() * 0.8 + 0.1
        ends = spread({"a": (chances, truth)}, seed)
        held += ends["group.a.accuracy.low"] <= 0.7 <= ends["group.a.accuracy.high"]
    assert 88 <= held <= 100


def test_intervals_hold_the_figures_and_shrink_with_more_rows() -> None:
    chance = torch.Generator().manual_seed(0)

    def group(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        truth = torch.randint(3, (rows,), generator=chance)
        logits = torch.randn(rows, 3, generator=chance, dtype=torch.double)
        logits[torch.arange(rows), truth] += 1
        return logits.softmax(-1), truth

    groups = {"few": group(30), "many": group(600)}
    ends = spread(groups)
    assert ends == spread(groups), "the same every time"
    for name, (chances, truth) in groups.items():
        for figure, value in merits(chances, truth).items():
            low, high = ends[f"group.{name}.{figure}.low"], ends[f"group.{name}.{figure}.high"]
            assert low <= value <= high and low < high
            narrow = ends[f"group.many.{figure}.high"] - ends[f"group.many.{figure}.low"]
            assert name == "many" or high - low > 2 * narrow
    worst = min(auc(*group) for group in groups.values())
    assert ends["worst_auc.low"] <= worst <= ends["worst_auc.high"]
    assert 0 <= ends["gap_accuracy.low"] <= ends["gap_accuracy.high"]
    assert "group.a.auc.low" not in spread({"a": (torch.full((4, 2), 0.5), torch.zeros(4, dtype=torch.long))})


# The files


def test_pictures_and_markdown_are_there(output: Path, found: Found) -> None:
    drawn = {name: {path.stem for path in (output / name / "pictures").iterdir()} for name in ("plain", "fair")}
    assert drawn == {"plain": {"front", "order", "importance"}, "fair": {"order", "importance", "groups"}}
    for path in output.glob("*/pictures/*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000
    text = (output / "plain" / "report.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert linked and all((output / "plain" / one).is_file() for one in linked)
    for one in found.best:
        assert one.path is not None and f"| {one.path.name} |" in text
    assert "| 01 | old | 20 |" in (output / "fair" / "report.md").read_text()


# The page


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize(
    ("name", "wanted_"), [("plain", {"front", "order", "importance"}), ("fair", {"order", "importance", "groups"})]
)
def test_the_page_draws_all_by_itself(browser: Browser, output: Path, width: int, name: str, wanted_: set[str]) -> None:
    browser.open(output / name / "report.html", width, 850)
    assert browser.value("document.documentElement.dataset.drawn") == "yes"
    assert browser.said == [] and browser.asked == [] and browser.value("window.taken ?? 0") == 0
    assert browser.value("document.documentElement.scrollWidth") <= width
    plots = browser.value("[...document.querySelectorAll('.plot')].map((p) => p.id)")
    assert set(plots) == wanted_
    for plot in plots:
        marks = f"document.querySelectorAll('#{plot} .main-svg .points path, #{plot} .main-svg .js-line').length"
        assert browser.value(marks) > 0, plot


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_names_cover_neither_each_other_nor_points(browser: Browser, output: Path, found: Found, width: int) -> None:
    browser.open(output / "plain" / "report.html", width, 850)
    boxes = """[...document.querySelectorAll('#front %s')].map((e) => e.getBoundingClientRect())
        .map((b) => [b.left, b.top, b.right, b.bottom])"""
    names = browser.value(boxes % ".annotation-text")
    points = browser.value(boxes % ".points path.point")
    assert len(names) >= min(3, len(found.best)) and len(points) >= 23
    middles = [((x + a) / 2, (y + b) / 2) for x, y, a, b in points]
    for one, other in itertools.combinations(names, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert not any(x < across < a and y < up < b for x, y, a, b in names for across, up in middles)


def test_the_page_can_be_read_without_seeing_it(browser: Browser, output: Path) -> None:
    for name in ("plain", "fair"):
        browser.open(output / name / "report.html", 1280, 850)
        levels = browser.value("[...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "a level is left out"
        assert browser.value("[...document.querySelectorAll('table')].every((t) => t.caption?.textContent.trim())")
        assert browser.value("[...document.querySelectorAll('th')].every((h) => h.scope)")
        plots = "[...document.querySelectorAll('.plot')]"
        labels = browser.value(plots + ".map((p) => [p.getAttribute('role'), p.ariaLabel])")
        assert all(role == "img" and re.search(r"\d", text) and len(text) > 30 for role, text in labels)


def test_the_page_works_by_keyboard(browser: Browser, output: Path) -> None:
    browser.open(output / "plain" / "report.html", 1280, 850)
    count = browser.value("""(() => { const all = [...document.querySelectorAll(
        'a[href], button, summary, [tabindex="0"]')].filter((e) => e.offsetParent
        && (e.tagName === 'SUMMARY' || !e.closest('details:not([open])')));
        all.forEach((e, i) => { e.dataset.place = i; }); return all.length; })()""")
    order = []
    for _ in range(count + 2):
        browser.press("Tab", 9)
        order.append(browser.value("document.activeElement.dataset.place ?? null"))
    reached = [int(place) for place in order if place is not None]
    assert reached[:count] == list(range(count))
    browser.value("document.querySelectorAll('th button')[2].focus()")
    browser.press("Enter", 13)
    values = [float(one) for one in browser.value(
        "[...document.querySelector('table').tBodies[0].rows].map((r) => r.cells[2].dataset.value)")]  # fmt: skip
    assert values == sorted(values) and browser.said == []


def test_a_page_without_plotly_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'deltaworks\[study\]'"):
        document("x", "", [], {}, "search.js")
