"""A whole comparison: its rows, its files, its page in a browser, and what is recommended from it."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltaworks.study.compare import Comparison, compare, read
from deltaworks.study.engine import Runner
from deltaworks.study.pages import save
from deltaworks.study.recommend import Limits, kept, plan_on, recommend, table
from deltaworks.study.spec import Study, amount
from deltaworks.study.summary import COSTS, summarise

from .browser import Browser
from .work import places, study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


class Cut(Exception):
    """Stands for whatever ends a study in the middle."""


@pytest.fixture(scope="module")
def stopped(folder: Path) -> int:
    """A study that is cut off after some runs; how many."""
    seen = []

    def tell(event: str, **figures: Any) -> None:
        if event == "row":
            seen.append(figures["row"]["key"])
            if figures["stage"] == "runs" and len(seen) == 12:
                raise Cut

    with Runner(folder / "cache", jobs=2) as runner, pytest.raises(Cut):
        compare(study(folder), runner, tell=tell)
    return len(set(seen))


@pytest.fixture(scope="module")
def found(folder: Path, stopped: int) -> Comparison:
    with Runner(folder / "cache", jobs=2) as runner:
        return compare(study(folder), runner)


@pytest.fixture(scope="module")
def output(folder: Path, found: Comparison) -> Path:
    save(found, folder / "out")
    return folder / "out"


def test_a_study_that_was_stopped_goes_on_where_it_was(found: Comparison, stopped: int) -> None:
    assert found.cached >= stopped
    assert found.run > 0


def test_a_second_run_runs_nothing(folder: Path, found: Comparison) -> None:
    with Runner(folder / "cache") as runner:
        again = compare(study(folder, title="another title"), runner)
    assert again.run == 0 and again.rows == found.rows


def test_every_method_and_baseline_runs_with_every_seed_on_every_work(found: Comparison) -> None:
    assert found.cells == ["limit 15", "limit 25"]
    assert set(found.names) == {"base", "in-context", "lora", "ia3", "nowhere", "full"}
    for cell in found.cells:
        for name in found.names:
            assert [row["seed"] for row in found.of(cell, name, done=False)] == [0, 1]


def test_a_method_that_fails_is_a_row_with_its_error(found: Comparison) -> None:
    for row in found.of(name="nowhere", done=False):
        assert row["status"] == "failed" and row["value"] is None and "matches nothing" in row["error"]
    assert all(row["error"] is None for row in found.rows if row["method"] != "nowhere")


def test_runs_of_one_seed_see_the_same_rows_in_the_same_order(found: Comparison) -> None:
    # These methods do not change the base's output at the start, so the first loss is that of the first batch.
    for cell in found.cells:
        for seed in (0, 1):
            first = {row["method"]: row["losses"][0] for row in found.of(cell) if row["seed"] == seed and row["losses"]}
            assert set(first) == {"lora", "ia3", "full"}
            assert max(first.values()) == pytest.approx(min(first.values()), rel=1e-4)
    starts = {row["losses"][0] for row in found.of(name="lora")}
    assert len(starts) == 4


def test_rates_are_chosen_once_along_axes_that_do_not_count(found: Comparison) -> None:
    for name in ("lora", "ia3", "full"):
        assert len({row["lr"] for row in found.of(name=name)}) == 1


def test_costs_and_forgetting_are_measured(found: Comparison) -> None:
    for row in found.of():
        assert row["example_flops"] > 0 and row["peak_memory_bytes"] is not None
        if row["kind"] == "tune":
            assert row["train_flops"] == row["step_flops"] * row["steps"] and row["step_seconds"] > 0
            assert row["domain_before"] > 0 and row["domain_after"] > 0
            assert row["evaluation_steps"] and len(row["losses"]) == 4
    full = found.of(name="full")
    assert all(row["trainable"] == row["total"] for row in full)


def test_a_summary_says_what_the_rows_say(found: Comparison) -> None:
    cell = summarise(found)["cells"][0]
    by_name = {one["name"]: one for one in cell["methods"]}
    values = found.values("limit 15", "lora")
    assert by_name["lora"]["mean"] == pytest.approx(sum(values.values()) / 2)
    assert by_name["lora"]["low"] == pytest.approx(min(values.values()), rel=1e-2)
    means = [one["mean"] for one in cell["methods"] if one["mean"] is not None]
    assert means == sorted(means) and cell["lower"]
    assert by_name["nowhere"]["failed"] == 2 and by_name["nowhere"]["mean"] is None
    assert cell["pairs"]["lora"]["base"] + cell["pairs"]["base"]["lora"] == 1
    for cost in COSTS:
        assert set(cell["fronts"][cost]) <= {"lora", "ia3", "full", "base", "in-context"}


def test_files_hold_the_whole_study(output: Path, found: Comparison) -> None:
    again = read(output)
    assert again.study == found.study
    plain = [{name: value for name, value in row.items() if value is not None} for row in again.rows]
    assert plain == [{name: value for name, value in row.items() if value is not None} for row in found.rows]
    assert Study.read(output / "study.yaml") == found.study
    assert json.loads((output / "summary.json").read_text()) == json.loads(json.dumps(summarise(found)))
    text = (output / "report.md").read_text()
    assert "| lora |" in text and "failed: " in text and "After Nobody 2020." in text
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert linked and sorted(linked) == sorted(f"pictures/{path.name}" for path in (output / "pictures").iterdir())
    for path in (output / "pictures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="holds no finished study"):
        read(output / "study.yaml")


def test_a_task_without_prompts_has_no_examples_in_them_and_a_new_head_forgets_nothing(folder: Path) -> None:
    from tests.training.conftest import prepared_data

    labelled = study(folder, data=prepared_data(folder, "classes"), axes={}, domain="nursery:library", rates=0, seeds=1,
                     methods=["bitfit"], rate_axes=None, budget="params=500", evaluate_every=None)  # fmt: skip
    with Runner(folder / "cache", jobs=2) as runner:
        rows = compare(labelled, runner).rows
    assert [row["method"] for row in rows] == ["base", "bitfit", "full"]
    assert all(row["error"] is None and row["metric"] == "accuracy" and row["lower"] is False for row in rows)
    assert all(row["domain_after"] is None for row in rows)


# The page


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_the_page_draws_all_by_itself(browser: Browser, output: Path, width: int) -> None:
    browser.open(output / "report.html", width, 850)
    assert browser.value("document.documentElement.dataset.drawn") == "yes"
    assert browser.said == [] and browser.asked == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    plots = browser.value("[...document.querySelectorAll('.plot')].filter((p) => p.offsetParent).map((p) => p.id)")
    assert set(plots) == {*(f"cost-{cost}" for cost in COSTS), "training", "held-out", "forgetting", "axis-0"}
    for plot in plots:
        marks = f"document.querySelectorAll('#{plot} .main-svg .points path, #{plot} .main-svg .js-line').length"
        assert browser.value(marks) > 0, plot
        box = browser.value(f"(({{width, height}}) => [width, height])(document.getElementById('{plot}')"
                            ".querySelector('.main-svg').getBoundingClientRect())")  # fmt: skip
        assert 0 < box[0] <= width and box[1] > 150


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_names_in_a_picture_of_costs_do_not_cover_each_other(browser: Browser, output: Path, width: int) -> None:
    browser.open(output / "report.html", width, 850)
    for cost in COSTS:
        names = browser.value(f"""[...document.querySelectorAll('#cost-{cost} .annotation-text')]
            .map((e) => e.getBoundingClientRect()).map((b) => [b.left, b.top, b.right, b.bottom])""")
        assert names, cost
        for one, other in itertools.combinations(names, 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], cost


def test_the_page_can_be_read_without_seeing_it(browser: Browser, output: Path) -> None:
    browser.open(output / "report.html", 1280, 850)
    levels = browser.value("[...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "a level is left out"
    assert browser.value("document.documentElement.lang") == "en"
    assert browser.value(
        "[...document.querySelectorAll('table')].every((t) => t.caption && t.caption.textContent.trim())"
    )
    assert browser.value("[...document.querySelectorAll('th')].every((h) => h.scope)")
    labels = browser.value("[...document.querySelectorAll('.plot')].map((p) => [p.getAttribute('role'), p.ariaLabel])")
    assert all(role == "img" and len(text) > 30 for role, text in labels)
    assert "lora" in dict(zip(browser.value("[...document.querySelectorAll('.plot')].map((p) => p.id)"),
                              (text for _, text in labels), strict=True))["cost-trainable"]  # fmt: skip
    named = "[...document.querySelectorAll('input, select')].every((i) => i.labels.length)"
    assert browser.value(named)
    assert browser.value("document.body.textContent.includes('LoRA & <others>')"), "a title is text"


def test_the_page_works_by_keyboard(browser: Browser, output: Path) -> None:
    browser.open(output / "report.html", 1280, 850)
    wanted = browser.value("""(() => { const all = [...document.querySelectorAll(
        'a[href], button, input, select, summary, [tabindex="0"]')].filter((e) => e.offsetParent
        && (e.tagName === 'SUMMARY' || !e.closest('details:not([open])')));
        all.forEach((e, i) => { e.dataset.place = i; }); return all.length; })()""")
    order = []
    for _ in range(wanted + 2):
        browser.press("Tab", 9)
        order.append(browser.value("document.activeElement.dataset.place ?? null"))
    reached = [int(place) for place in order if place is not None]
    assert set(reached) == set(range(wanted)), "something cannot be reached"
    assert reached[:wanted] == list(range(wanted)), "the focus jumps"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    browser.value("document.querySelector('th button').focus()")
    browser.press("Enter", 13)
    assert browser.value(outline) == "solid"
    # The first column is now sorted by name, upwards, then downwards.
    names = "[...document.querySelector('table').tBodies[0].rows].map((r) => r.cells[0].dataset.value)"
    upwards = browser.value(names)
    assert upwards == sorted(upwards) and browser.value("document.querySelector('th').ariaSort") == "ascending"
    browser.press("Enter", 13)
    assert browser.value(names) == upwards[::-1]
    assert browser.said == []


def test_the_page_shows_what_is_chosen(browser: Browser, output: Path) -> None:
    browser.open(output / "report.html", 1280, 850)
    tables = "[...document.querySelectorAll('#results .scroll')].map((t) => !t.hidden)"
    drawn = "document.getElementById('cost-trainable').data.map((t) => t.name).filter(Boolean).sort()"
    assert browser.value(tables) == [True, False]
    before = browser.value("document.getElementById('cost-trainable').ariaLabel")
    assert browser.value(drawn) == ["full", "ia3", "lora"]
    browser.value("""(() => { const s = document.getElementById('work');
        s.value = '1'; s.dispatchEvent(new Event('change')); })()""")
    assert browser.value(tables) == [False, True]
    assert browser.value("document.getElementById('cost-trainable').ariaLabel") != before
    browser.value("document.querySelector('input[value=lora]').focus()")
    browser.press(" ", 32)
    assert browser.value(drawn) == ["full", "ia3"]
    assert browser.value("document.querySelectorAll('tr[data-method=lora]:not([hidden])').length") == 0
    assert browser.said == []


def test_the_page_has_no_script_of_a_stranger(folder: Path, found: Comparison, browser: Browser) -> None:
    hostile = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 1'>"
    rows = [row | {"error": hostile, "method": hostile} if row["method"] == "nowhere" else row for row in found.rows]
    save(Comparison(found.study, rows), folder / "hostile")
    browser.open(folder / "hostile" / "report.html", 1280, 850)
    assert browser.value("window.taken ?? 0") == 0 and browser.said == [] and browser.asked == []


# Recommendations


def test_a_recommendation_keeps_within_limits_and_gives_reasons(output: Path, found: Comparison) -> None:
    cells = table(output)
    good, bad = recommend(cells, Limits())
    assert {one.name for one in good} == {"lora", "ia3", "full"} and not bad
    assert [one.gain for one in good] == sorted((one.gain for one in good), reverse=True)
    trained = {one["name"]: one["trainable"] for one in cells[0]["methods"] if one["mean"] is not None}
    good, bad = recommend(cells, Limits(params=trained["lora"]))
    assert {one.name for one in good} == {"lora", "ia3"} and [one.name for one in bad] == ["full"]
    assert "the limit is" in bad[0].reason
    for one in good:
        assert one.reason.startswith(one.name) and one.reason.endswith(".") and one.reason.count("\n") == 0
        assert "% of full fine-tuning" in one.reason and "merges into the base" in one.reason
    assert recommend(cells, Limits(mergeable=False))[0] == []
    assert {one.name for one in recommend(cells, Limits(memory=1))[1]} == {"lora", "ia3", "full"}
    with pytest.raises(ValueError, match="it has causal-lm"):
        recommend(cells, Limits(), task="seq2seq")


def test_costs_on_another_base_are_planned(output: Path, folder: Path) -> None:
    cells = table(output)
    planned = plan_on(places(folder)["base"], cells, batch_size=2, max_length=16)
    good, _ = recommend(cells, Limits(), planned=planned)
    lora = next(one for one in good if one.name == "lora")
    assert lora.planned and lora.costs["trainable"] == planned["lora"]["trainable"] > 0
    assert lora.costs["peak_memory_bytes"] and lora.costs["step_seconds"] is None


def test_the_table_that_ships_is_what_a_study_gives(found: Comparison) -> None:
    cells = table()
    assert {cell["place"]["work"] for cell in cells} == {"docstrings", "digits"}
    shipped, ours = cells[0]["methods"][0], kept(summarise(found))["cells"][0]["methods"][0]
    assert shipped.keys() == ours.keys()
    good, _ = recommend(cells, Limits(params=1e5, mergeable=True))
    assert good and all((one.costs["trainable"] or 0) <= 1e5 for one in good)
    for cell in cells:
        assert {"base", "full", "lora"} <= {one["slug"] for one in cell["methods"]}


def test_the_table_that_ships_knows_the_registered_methods() -> None:
    from deltaworks.core.registry import methods

    for cell in table():
        slugs = {one["slug"] for one in cell["methods"] if one["kind"] == "tune"}
        assert slugs <= set(methods()) and len(slugs) > 70
        assert all(one["error"] for one in cell["methods"] if one["mean"] is None)


def test_a_method_that_failed_on_some_work_says_so() -> None:
    cells = copy.deepcopy(table())
    one = next(one for one in cells[1]["methods"] if one["name"] == "lora")
    one |= {"mean": None, "error": "no attention here"}
    left_out = {one.name: one.why_not for one in recommend(cells, Limits())[1]}
    assert left_out["lora"] == "no result on digits: no attention here"
    assert "lora" in {one.name for one in recommend(cells, Limits(), task="causal-lm")[0]}


def test_what_ends_worse_than_the_base_is_no_recommendation() -> None:
    cells = copy.deepcopy(table())
    base, lora = (next(one for one in cells[0]["methods"] if one["slug"] == slug) for slug in ("base", "lora"))
    lora["mean"] = base["mean"] + 0.5
    left_out = {one.name: one.why_not for one in recommend(cells, Limits(gains=True))[1]}
    assert (left_out["lora"] or "").startswith("worse than the base somewhere: loss")


# The study's file


def test_a_study_is_read_from_a_file_and_options_win(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"methods": ["lora"], "steps": 5, "seeds": [3, 4], "base": "nursery:decoder"}))
    read_ = Study.read(path, epochs=1.0, methods=["family_of_one"][:0] or ["ia3"])
    assert read_.keys == {"base": "nursery:decoder", "epochs": 1.0} and read_.all_seeds == [3, 4]
    assert [entry.name for entry in read_.entries()] == ["ia3", "full"]
    assert Study.of(read_.as_dict()) == read_


def test_axes_combine_and_set_any_key() -> None:
    sizes = [{"name": "xs", "base": "nursery:decoder-xs", "batch_size": 4}, {"name": "s", "base": "nursery:decoder-s"}]
    made = Study.of({"methods": ["lora"], "axes": {"size": sizes, "limit": [10, 100]}, "steps": 3, "batch_size": 8})
    cells = made.cells()
    assert [cell.name for cell in cells] == ["size xs, limit 10", "size xs, limit 100", "size s, limit 10",
                                             "size s, limit 100"]  # fmt: skip
    recipe = made.recipe(cells[1], made.entries()[0], 7)
    assert (recipe.base, recipe.batch_size, recipe.limit, recipe.seed) == ("nursery:decoder-xs", 4, 100, 7)
    assert cells[0].domain == "nursery:library"
    own = Study.of({"axes": {"work": [{"name": "a", "data": "x.csv", "metric": "f1", "domain": "none"}]}, "steps": 1})
    assert own.cells()[0].metric == "f1" and own.cells()[0].domain is None


def test_families_and_all_stand_for_their_methods() -> None:
    from deltaworks.core.registry import methods

    prompts = {slug for slug, cls in methods().items() if cls.family == "prompts"}
    assert {entry.slug for entry in Study.of({"methods": "prompts", "baselines": [], "steps": 1}).entries()} == prompts
    assert {entry.slug for entry in Study.of({"methods": ["all"], "steps": 1}).entries()} == set(methods())


@pytest.mark.parametrize(("given", "said"), [
    ({"metods": ["lora"]}, "did you mean method"),
    ({"methods": ["lroa"]}, "did you mean"),
    ({"methods": [{"settings": {}}]}, "names no method"),
    ({"methods": [{"method": "lora", "settings": {"rnak": 2}}]}, "no hyper-parameter 'rnak'"),
    ({"methods": ["lora", {"method": "lora", "settings": {"rank": 2}}]}, "two entries are called 'lora'"),
    ({"axes": {"limit": 5}}, "must be a list"),
    ({"axes": {"wrk": [1, 2]}}, "no key 'wrk'"),
    ({"axes": {"limit": [5, 5]}}, "two values called '5'"),
    ({"seed": 3}, "use seeds"),
    ({"seeds": 0}, "seeds=0"),
    ({"budget": "params"}, "write params=N"),
    ({"budget": "memory=lots"}, "no size of memory"),
    ({"budget": "time=5parsecs"}, "not an amount"),
    ({"rate_axes": ["size"]}, "the axes are none"),
    ({"baselines": ["nothing"]}, "base, in-context, full"),
])  # fmt: skip
def test_what_is_wrong_with_a_study_is_said_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        Study.of({"steps": 1}, given)
    assert "\n" not in str(error.value)


def test_amounts_are_read_as_people_write_them() -> None:
    assert (amount("1e5"), amount("100k"), amount("2.5M")) == (1e5, 1e5, 2.5e6)
    assert (amount("8GiB", "bytes"), amount("90s", "seconds"), amount("2min", "seconds")) == (8 << 30, 90, 120)
