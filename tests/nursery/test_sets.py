"""The data sets the nursery builds from the running Python."""

import ast
import sys

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from deltaworks import nursery
from deltaworks.nursery import corpus
from deltaworks.nursery.kept import kept_set


@pytest.fixture(scope="module")
def docstrings():
    return nursery.data("docstrings")


@pytest.fixture(scope="module")
def packages():
    return nursery.data("nursery:packages")


def test_docstrings_are_many_and_occur_once(docstrings):
    completions = [*docstrings["train"]["completion"], *docstrings["validation"]["completion"]]
    assert len(docstrings["train"]) > 2000
    assert len(docstrings["validation"]) > 200
    assert len(set(completions)) == len(completions)
    assert all(15 <= len(text) <= 200 and "\n" not in text for text in completions)


def test_a_docstring_row_is_a_piece_of_source(docstrings):
    for row in docstrings["validation"]:
        tree = ast.parse(row["prompt"] + row["completion"].replace('"', "'").replace("\\", "/") + '"""')
        inner = tree.body[0]
        while isinstance(inner, ast.ClassDef):
            inner = inner.body[0]
        assert isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)


def test_held_out_docstrings_are_from_modules_no_base_has_read(docstrings):
    read = {document.module for document in corpus.documents("train")}
    assert read.isdisjoint(docstrings["validation"]["module"])
    assert read.issuperset(docstrings["train"]["module"])


def test_a_pure_python_twin_is_on_the_side_of_its_module():
    assert corpus.split_of("_pydecimal") == corpus.split_of("decimal")
    assert corpus.split_of("_pyio") == corpus.split_of("io")


def test_the_corpus_holds_no_tests_and_no_tables():
    names = {document.name for split in ("train", "validation") for document in corpus.documents(split)}
    assert "json/decoder.py" in names
    assert not any("/test" in name or name.startswith(("test/", "encodings/", "_sysconfigdata")) for name in names)


def test_packages_has_every_label_on_both_sides_and_no_text_twice(packages):
    names = packages["train"].features["label"].names
    assert len(names) == len(set(names)) == 16
    assert set(packages["train"]["label"]) == set(packages["validation"]["label"]) == set(range(16))
    texts = [*packages["train"]["text"], *packages["validation"]["text"]]
    assert len(set(texts)) == len(texts) > 1000
    assert max(len(text) for text in texts) <= 600


def test_digits_are_grey_images_with_labels():
    pytest.importorskip("sklearn")
    digits = nursery.data("digits")
    assert (len(digits["train"]), len(digits["validation"])) == (1437, 360)
    row = digits["train"][0]
    assert (row["image"].size, row["image"].mode, row["label"]) == ((8, 8), "L", 0)
    assert row["image"].getextrema() == (0, 239)  # 15 of 16 grey levels
    assert digits["train"].features["label"].names == list("0123456789")


def test_digits_without_scikit_learn_name_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'deltaworks\[vision\]'"):
        nursery.data("digits")


@pytest.mark.parametrize("ask", [nursery.data, nursery.base_path, nursery.resolve, nursery.base])
def test_an_unknown_name_is_answered_with_what_there_is(ask):
    with pytest.raises(ValueError, match=r"no .* 'nursery:poems'; there are nursery:\w+, nursery:") as caught:
        ask("nursery:poems")
    assert "\n" not in str(caught.value)


def test_a_base_is_not_data_and_data_is_not_a_base():
    with pytest.raises(ValueError, match="no data set 'decoder'"):
        nursery.data("decoder")
    with pytest.raises(ValueError, match="no base 'docstrings'"):
        nursery.base("docstrings")


def test_a_set_is_the_same_made_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAWORKS_CACHE", str(tmp_path))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"text": ["é", "b\n"], "label": [1, 0]}
    sets = DatasetDict({split: Dataset.from_dict(rows, features=features) for split in ("train", "validation")})
    made = []
    found = [kept_set("poems", lambda: made.append(1) or sets) for _ in range(2)]
    assert made == [1] and list((tmp_path / "nursery").glob("poems-*.json"))
    for one in found:
        assert list(one) == ["train", "validation"]
        assert one["train"].features == features and one["train"][:] == rows
