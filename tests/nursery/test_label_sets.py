"""Data sets with several labels a text, and with choices."""

import sys

import pytest

from deltaworks import nursery
from deltaworks.data import load
from deltaworks.nursery import label_sets


@pytest.fixture(scope="module")
def holidays():
    pytest.importorskip("holidays")
    return nursery.data("holidays")


def test_a_holiday_has_every_month_it_falls_in(holidays):
    rows = {row["text"]: row for name in ("train", "validation") for row in holidays[name]}
    assert rows["Noël"]["label"] == [11]
    assert rows["Vendredi saint"]["label"] == [2, 3], "March or April"
    named = holidays["train"].features["rule"].names
    assert [named[rows[text]["rule"]] for text in ("Noël", "Vendredi saint")] == ["fixed", "easter"]
    assert any(len(row["label"]) > 1 and named[row["rule"]] == "other" for row in rows.values()), "lunar calendars"


def test_no_text_of_a_language_occurs_twice(holidays):
    rows = [(row["language"], row["text"]) for name in ("train", "validation", "surprise") for row in holidays[name]]
    assert len(set(rows)) == len(rows) > 1500


def test_no_held_out_holiday_was_seen_in_any_language(holidays):
    assert set(holidays["translated_validation"]["text"]).isdisjoint(holidays["translated"]["text"])
    assert set(holidays["translated_validation"]["text"]).isdisjoint(holidays["english"]["text"])


def test_the_scenarios_have_the_same_rows(holidays):
    for name in ("train", "validation", "surprise"):
        other = holidays["translated" if name == "train" else f"translated_{name}"]
        assert [row["label"] for row in holidays[name]] == [row["label"] for row in other]
    english = [row for row in holidays["train"] if row["language"] == "en"]
    assert english == list(holidays["english"])
    assert [row["text"] for row in holidays["translated"] if row["language"] == "en"] == holidays["english"]["text"][:]


def test_surprise_languages_are_nowhere_else(holidays):
    assert set(holidays["surprise"]["language"]) == set(label_sets.SURPRISE)
    assert set(holidays["train"]["language"]).isdisjoint(label_sets.SURPRISE)
    assert len(set(holidays["train"]["language"])) > 50


def test_both_questions_are_read_as_what_they_are(holidays):
    months = load("nursery:holidays", validation="translated_validation", split="translated")
    assert months.labels is not None and months.labels.problem_type == "multi_label_classification"
    assert months.labels.names == label_sets.MONTHS
    rule = load("nursery:holidays", columns={"label": "rule"}, limit=50)
    assert rule.labels is not None and rule.labels.problem_type == "single_label_classification"
    assert rule.labels.names == label_sets.RULES


def test_holidays_without_the_package_name_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "holidays", None)
    with pytest.raises(ImportError, match=r"pip install 'deltaworks\[studies\]'"):
        nursery.data("holidays")


def test_one_of_four_docstrings_is_the_functions_own():
    documented, choices = nursery.data("docstrings"), nursery.data("choices")
    for split in ("train", "validation"):
        assert choices[split]["prompt"][:] == documented[split]["prompt"][:]
        right = [row["choices"][row["answer"]] for row in choices[split]]
        assert right == documented[split]["completion"][:]
        assert all(len(set(row["choices"])) == 4 for row in choices[split])
    answers = choices["train"]["answer"][:]
    assert all(0.2 < answers.count(place) / len(answers) < 0.3 for place in range(4)), "no place gives it away"
    module = {row["completion"]: row["module"] for split in documented.values() for row in split}
    near = [module[text] == row["module"] for row in choices["train"] for text in row["choices"]]
    assert sum(near) / len(near) > 0.9, "the others are of the same module where it has enough"
    assert nursery.data("choices")["validation"][5] == choices["validation"][5]
