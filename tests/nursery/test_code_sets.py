"""The nursery's tasks on code."""

import ast
import random
import sysconfig
from functools import cache
from itertools import accumulate

import pytest

from deltaworks import nursery
from deltaworks.data import load
from deltaworks.nursery import code_sets, corpus, functions, programs, rewriting

WRITTEN = ("functions", "summaries", "tests")
JUDGED = ("defects", "clones", "search")


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """A cache of this module's own, so that rows are made here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAWORKS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def data(name):
    return nursery.data(name)


def both(name, column):
    found = data(name)
    return [*found["train"][column], *found["validation"][column]]


@pytest.mark.parametrize("name", [*WRITTEN, *JUDGED])
def test_held_out_rows_are_of_modules_that_no_base_has_read(name):
    found = data(name)
    assert len(found["train"]) > 800
    assert len(found["validation"]) >= 200
    assert {corpus.split_of(module) for module in found["train"]["module"]} == {"train"}
    assert {corpus.split_of(module) for module in found["validation"]["module"]} == {"validation"}
    assert len(set(found["train"]["module"][:200])) > 20  # a small limit still takes of everything


@pytest.mark.parametrize("name", [*WRITTEN, "programs"])
def test_no_target_occurs_twice(name):
    targets = both(name, "completion")
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize(("name", "columns"), [("defects", ["text"]), ("clones", ["text", "text_pair"])])
def test_no_function_is_judged_twice(name, columns):
    texts = list(zip(*(both(name, column) for column in columns), strict=True))
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", JUDGED)
def test_labels_are_balanced_and_named(name):
    labels = both(name, "label")
    assert 0.45 < sum(labels) / len(labels) < 0.55
    assert tuple(data(name)["train"].features["label"].names) == code_sets.LABELS[name]


@pytest.mark.parametrize("name", ["functions", "tests", "programs"])
def test_prompt_and_completion_are_one_function(name):
    for row in data(name)["validation"].select(range(100)):
        last = row["prompt"].split("\n\ndef ")[-1] if name == "tests" else row["prompt"]
        source = "def " + last if name == "tests" else last
        assert functions.parsed(source + row["completion"]) is not None


def test_a_function_is_cut_out_whole():
    source = '''
class Queue:
    @property
    def size(
        self,
        extra=0,
    ) -> int:
        """How many."""

        # counted once
        if extra:
            return 1
    # a remark on what follows
    def rest(self): return 2
'''
    (found,) = functions.inside(corpus.Document("queue", "queue.py", source))
    assert (found.name, found.unit, found.owner) == ("size", "queue.py:Queue", "Queue")
    assert found.head == 'def size(\n    self,\n    extra=0,\n) -> int:\n    """How many."""'
    assert found.body == "\n    # counted once\n    if extra:\n        return 1"
    assert found.bare == "def size(\n    self,\n    extra=0,\n) -> int:\n" + found.body


def test_what_is_cut_out_is_what_python_reads_in_the_file():
    document = next(one for one in corpus.sources() if one.name == "queue.py")
    nodes = [node for node in ast.walk(ast.parse(document.text)) if isinstance(node, ast.FunctionDef)]
    whole = {(node.name, rewriting.renamed(ast.unparse(node))) for node in nodes}
    found = list(functions.inside(document))
    assert len(found) > 15
    assert {(one.name, rewriting.renamed(one.source)) for one in found} <= whole


def test_a_fault_changes_one_place_of_the_kind_it_says():
    source = "def f(self, a, b):\n    if a < b and not b:\n        a += 3\n    return a[b - 1]"
    seen = {}
    for draw in range(400):
        before, text, kind = rewriting.faulty(source, draw)
        seen.setdefault(kind, set()).add(text)
        assert before == source.replace("not b", "(not b)")
        assert text != before
        ast.parse(text)
    assert set(seen) == {"comparison", "operator", "off by one", "variable"}
    assert "def f(self, a, b):\n    if a <= b and (not b):\n        a += 3\n    return a[b - 1]" in seen["comparison"]
    assert any("a or" in text or "b or" in text for text in seen["operator"])
    assert any("a[b - 2]" in text for text in seen["off by one"])
    assert any("a[a - 1]" in text for text in seen["variable"])


def test_all_faults_at_once_are_named_together():
    source = "def f(a, b):\n    if a < b and (not b):\n        a += 3\n    return a[b - 1]"
    assert rewriting.faulty(source, None, ("off by one", "comparison")) == (
        source,
        "def f(a, b):\n    if a <= b and (not b):\n        a += 4\n    return a[b - 2]",
        "comparison and off by one",
    )
    assert rewriting.faulty(source, None, ("negation",)) is None


def test_nothing_to_get_wrong_is_no_fault():
    assert rewriting.faulty("def f(self):\n    return self.name", 7) is None
    assert rewriting.faulty("no function", 7) is None


def test_other_words_do_the_same():
    sources = [one.source for one in functions.functions() if one.module == "bisect"]
    assert len(sources) >= 2
    randomness = random.Random(0)

    def nowhere(numbers, x, lo, hi, key=None):
        return lo

    for source in sources:
        scopes = [{"__name__": "there"}, {"__name__": "here"}]
        for scope, text in zip(scopes, (rewriting.renamed(source), rewriting.reworded(source)), strict=True):
            scope |= {"bisect_left": nowhere, "bisect_right": nowhere}
            exec(text, scope)
        parameters = functions.parsed(rewriting.reworded(source)).args
        assert [one.arg for one in parameters.args] == ["v0", "v1", "v2", "v3"]
        for _ in range(20):
            numbers = sorted(randomness.choices(range(9), k=6))
            one, other = ([*numbers], [*numbers])
            results = scopes[0]["function"](one, 4), scopes[1]["function"](other, 4)
            assert results[0] == results[1]
            assert one == other


def test_a_clone_pair_shares_what_cannot_be_renamed():
    for row in data("clones")["validation"].select(range(60)):
        attributes = [
            sorted(node.attr for node in ast.walk(ast.parse(row[column])) if isinstance(node, ast.Attribute))
            for column in ("text", "text_pair")
        ]
        assert row["label"] == 0 or attributes[0] == attributes[1]


def test_length_does_not_tell_a_clone():
    rows = data("clones")["train"][:]
    pairs = zip(rows["text"], rows["text_pair"], strict=True)
    apart = sorted(zip((abs(len(text) - len(pair)) for text, pair in pairs), rows["label"], strict=True))
    nearest_called_same = accumulate((1 if label else -1 for _, label in apart), initial=rows["label"].count(0))
    assert max(nearest_called_same) / len(apart) < 0.6


def test_a_test_is_of_the_function_that_it_is_named_after():
    for row in data("tests")["train"].select(range(100)):
        focal, _, header = row["prompt"].rpartition("\n\n")
        name = functions.parsed(focal).name.strip("_").lower()
        assert header.removeprefix("async ").removeprefix("def ").lower().startswith(f"test_{name}")


def test_python_without_tests_names_what_to_install(monkeypatch, tmp_path):
    library = tmp_path / "lib"
    library.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setenv("DELTAWORKS_CACHE", str(tmp_path))
    with pytest.raises(ImportError, match="libpython3-testsuite") as caught:
        nursery.data("tests")
    assert "\n" not in str(caught.value)


def test_every_program_does_what_its_tests_say():
    for row in programs.programs(60, seed=3):
        scope = {}
        exec(row["prompt"] + row["completion"], scope)
        tests = [line for line in row["prompt"].split("\n") if line.startswith("    ")][1:]
        shown = [line.strip() for line in row["prompt"].splitlines()]
        calls = [number for number, line in enumerate(shown) if line.startswith(">>> ")]
        assert len(calls) == programs.TESTS and tests
        for number in calls:
            assert str(eval(shown[number].removeprefix(">>> "), scope)) == shown[number + 1]


def test_a_package_has_splits_of_its_own_by_class():
    rows = nursery.data("nursery:functions/logging")
    assert set(rows["train"]["module"]) == set(rows["validation"]["module"]) == {"logging"}
    assert 0.1 < len(rows["validation"]) / (len(rows["train"]) + len(rows["validation"])) < 0.35
    units = {}
    for one in functions.functions():
        if one.text is not None:
            units.setdefault(one.body + "\n", one.unit)
    sides = [{units[body] for body in rows[split]["completion"]} for split in ("train", "validation")]
    assert not sides[0] & sides[1]


def test_a_package_is_read_like_any_source():
    found = load("nursery:defects/email", limit=20)
    assert (found.format, len(found.train), found.labels.names) == ("text-label", 20, ("correct", "defective"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("functions/pathological", "0 rows in 0 classes or files are of this package; .* as of tkinter"),
        ("digits/ten", "digits has no groups; functions, "),
        ("nursery:poems/logging", "no data set 'nursery:poems'"),
    ],
)
def test_what_is_no_part_is_answered_with_what_there_is(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        nursery.data(name)
    assert "\n" not in str(caught.value)


def test_rows_are_the_same_made_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAWORKS_CACHE", str(tmp_path))
    first = nursery.data("summaries")
    assert list((tmp_path / "nursery").glob("summaries-*.json"))
    monkeypatch.setattr(code_sets, "ROWS", {})
    assert nursery.data("summaries")["train"][:] == first["train"][:]
