"""Rows in: sources, formats, bad rows, held-out rows."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks import nursery
from deltaworks.data import BadRow, load

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "disk", "list", "dataset"])
def test_every_source_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    table = datasets.Dataset.from_list(PAIRS)
    if kind == "jsonl":
        lines(path, PAIRS)
    elif kind == "json":
        path.write_text(json.dumps(PAIRS, indent=2))
    elif kind in ("csv", "tsv"):
        table.to_csv(str(path), index=False, sep="," if kind == "csv" else "\t")
    elif kind == "parquet":
        table.to_parquet(str(path))
    elif kind == "disk":
        table.save_to_disk(str(path))
    source = {"list": PAIRS, "dataset": table}.get(kind, path)
    data = load(source, validation=None)
    assert data.format == "prompt-completion"
    assert list(data.train) == PAIRS
    assert data.validation is None


FORMS = {
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "instruction": {"instruction": "do", "input": "", "output": "done"},
    "prompt-completion": {"question": "a", "answer": "b"},
    "source-target": {"document": "a long text", "summary": "short"},
    "tokens-tags": {"tokens": ["a", "b"], "ner_tags": ["X", "O"]},
    "image-label": {"image": np.zeros((4, 4), dtype=np.uint8), "label": "black"},
    "text-label": {"premise": "a", "hypothesis": "b", "label": "same"},
    "text": {"text": "only text"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


@pytest.mark.parametrize("name", FORMS)
def test_formats_are_recognised_by_their_columns(name):
    data = load([FORMS[name]] * 3, validation=None)
    assert data.format == {"sharegpt": "chat"}.get(name, name)
    assert len(data.train) == 3


def test_sharegpt_becomes_a_chat():
    data = load([FORMS["sharegpt"]], validation=None)
    assert data.train[0] == FORMS["chat"]


def test_messages_keep_fields_that_only_some_of_them_have():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    rows = [{"messages": [{"role": "user", "content": "a"}, call]}, FORMS["chat"]]
    data = load(rows, validation=None)
    assert data.train[0]["messages"][1] == call
    assert data.train[1] == FORMS["chat"]


def test_columns_can_be_named():
    rows = [{"q": "a", "a": "b", "prompt": "not this"}]
    data = load(rows, columns={"prompt": "q", "completion": "a"}, validation=None)
    assert data.train[0] == {"prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match="no column 'x'; there are a, prompt, q"):
        load(rows, columns={"prompt": "x"})


def test_a_chat_in_prompt_and_completion_trains_only_the_completion():
    turns = FORMS["chat"]["messages"]
    data = load([{"prompt": turns + turns[:1], "completion": turns[1:]}], validation=None)
    assert [m.get("weight", 1) for m in data.train[0]["messages"]] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        (b'{"text": "a"}\n{"text": \n', 2, "broken JSON at column"),
        (b'{"text": "a"}\n["b"]\n', 2, "an object with named fields"),
        (b'{"text": "a"}\n{"text": 5}\n', 2, "text is 5, a int; a text is needed"),
        (b'{"text": "a"}\n\n{"text": "  "}\n', 3, "text is empty"),
        (b'{"text": "a"}\n{"body": "b"}\n', 2, "text missing, which text needs; the columns are body"),
        (b'{"text": "a"}\n{"text": null}\n', 2, "text is missing"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not UTF-8"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', 2, "surrogate"),
        (b'{"text": "a"}\n' + b'{"text":' + b"[" * 100_000 + b"\n", 2, "JSON"),
        (b'{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n', 2, "label is nan; a class or a finite number"),
        (b'{"text": "a", "label": "x"}\n{"text": "b", "label": {}}\n', 2, "label is {}"),
        (b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n{"text": "c", "label": ["x"]}\n', 3, "one class"),
        (b'{"tokens": ["a"], "tags": ["X"]}\n{"tokens": ["a", "b"], "tags": ["X"]}\n', 2, "2 tokens but 1 tags"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', 1, "no assistant turn"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n', 1, "the same"),
        (b'{"image": "none.png", "label": 1}\n', 1, "no such file"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, content, line, problem):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadRow) as stopped:
        load(path, validation=None)
    message = str(stopped.value)
    assert f"train.jsonl line {line}:" in message
    assert problem in message
    assert "\n" not in message


def test_bad_rows_can_be_skipped_and_are_listed(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\nnonsense\r\n{"text": "b"}\r\n{"text": ""}\r\n')
    data = load(path, validation=None, on_bad_row="skip")
    assert list(data.train["text"]) == ["a", "b"]
    assert [bad.where.rpartition(" ")[2] for bad in data.skipped] == ["2", "4"]
    assert "2 bad rows left out" in str(data)


def test_a_file_of_bad_rows_only_is_an_error_even_when_they_are_skipped(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": ""}\n{"text": 1}\n')
    with pytest.raises(ValueError, match="no usable row; all 2 are bad"):
        load(path, on_bad_row="skip")


def test_csv_rows_are_named_by_the_line_they_begin_on(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b'text,label\r\n"two\r\nlines",x\r\nonly one field\r\nfine,y\r\n\xff,x\r\n"a"b,x\r\n')
    data = load(path, validation=None, on_bad_row="skip")
    assert list(data.train["text"]) == ["two\r\nlines", "fine"]
    assert [bad.where.rpartition(" ")[2] for bad in data.skipped] == ["4", "6", "7"]
    assert "1 fields where the header names 2 (text, label)" in str(data.skipped[0])


def test_parquet_rows_are_counted_from_one(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), path)
    with pytest.raises(BadRow, match=r"data\.parquet row 2: text is missing"):
        load(path, validation=None)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.parquet", b"not parquet", "not a readable Parquet file"),
        ("a.csv", b"", "no header"),
        ("a.csv", b"text,text\na,b\n", "not all different"),
        ("a.json", b'[{"text": "a"},\n{"text": ]', r"line 2: broken JSON"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "comma"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b'{"x": 1}\n', "columns x are no known format"),
        ("a.bin", b"x", "unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as stopped:
        load(path)
    assert "\n" not in str(stopped.value)


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "nothing.jsonl")


def test_a_hub_name_that_cannot_be_loaded_is_one_line(monkeypatch):
    def offline(name, config):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"somebody/something: no local file.*Couldn't reach the Hub") as stopped:
        load("somebody/something")
    assert "\n" not in str(stopped.value)


def test_a_hub_name_is_loaded_with_its_configuration(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("somebody/something:small", validation=None).train) == 20
    assert asked == [("somebody/something", "small")]


def test_the_nursery_is_asked_by_name(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_list([{"text": "t", "label": 1}] * 4, features=features)
    asked = []

    def from_nursery(name):
        asked.append(name)
        return datasets.DatasetDict(train=table, validation=table.select(range(2)))

    monkeypatch.setattr(nursery, "data", from_nursery)
    data = load("nursery:packages", limit=3)
    assert asked == ["packages"]
    assert (data.format, data.labels.names) == ("text-label", ("a", "b"))
    assert (len(data.train), len(data.validation)) == (3, 2)


def test_a_folder_knows_its_splits_by_name(tmp_path):
    lines(tmp_path / "train-00000.jsonl", PAIRS[:5])
    lines(tmp_path / "train-00001.jsonl", PAIRS[5:10])
    lines(tmp_path / "my_dev.jsonl", PAIRS[10:12])
    lines(tmp_path / "test.jsonl", PAIRS[12:])
    data = load(tmp_path)
    assert list(data.train) == PAIRS[:10]
    assert list(data.validation) == PAIRS[10:12]
    assert len(load(tmp_path, split="test", validation=None).train) == 8
    with pytest.raises(ValueError, match="no split 'extra'; there are test, train, validation"):
        load(tmp_path, split="extra")


def test_a_folder_of_images_has_one_class_per_subfolder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("dark", 0), ("light", 255)):
        (tmp_path / name).mkdir()
        for index in range(2):
            image.new("L", (5, 4), colour).save(tmp_path / name / f"{index}.png")
    data = load(tmp_path, validation=None)
    assert data.labels is not None
    assert data.labels.names == ("dark", "light")
    assert sorted(data.train["label"]) == [0, 0, 1, 1]
    (tmp_path / "dark" / "broken.png").write_bytes(b"\x89PNG no")
    with pytest.raises(BadRow, match=r"broken\.png: image cannot be read"):
        load(tmp_path)


def test_held_out_rows_depend_on_the_seed_only():
    first, again, other = load(PAIRS, seed=3), load(PAIRS, seed=3), load(PAIRS, seed=4)
    assert list(first.validation) == list(again.validation) != list(other.validation)
    assert len(first.validation) == 2
    together = [row["prompt"] for row in [*first.train, *first.validation]]
    assert sorted(together) == sorted(row["prompt"] for row in PAIRS)
    with pytest.raises(ValueError, match="a share in"):
        load(PAIRS, validation=1.5)


@pytest.mark.parametrize(
    ("values", "problem", "names", "encoded"),
    [
        (["b", "a", "b"], "single_label_classification", ("a", "b"), [1, 0, 1]),
        ([10, 2, 10], "single_label_classification", ("2", "10"), [1, 0, 1]),
        ([True, False], "single_label_classification", ("false", "true"), [1, 0]),
        ([1, 2.5], "regression", ("value",), [1.0, 2.5]),
        ([["x", "y"], [], ["y"]], "multi_label_classification", ("x", "y"), [[0, 1], [], [1]]),
        ([[0.5, 1.0], [2.0, 3.0]], "regression", ("value_0", "value_1"), [[0.5, 1.0], [2.0, 3.0]]),
    ],
)
def test_labels_say_which_problem_they_are(values, problem, names, encoded):
    data = load([{"text": "t", "label": value} for value in values], validation=None)
    assert data.labels is not None
    assert (data.labels.problem_type, data.labels.names) == (problem, names)
    assert list(data.train["label"]) == encoded


def test_a_column_that_only_later_rows_have_is_kept():
    rows = [{"text": "a", "label": 0}, {"text": "b", "sentence2": "c", "label": 1}]
    assert list(load(rows, validation=None).train["text_pair"]) == [None, "c"]


def test_one_stray_list_does_not_change_what_labels_mean():
    rows = [{"text": "a", "label": value} for value in ("x", ["x"], "y")]
    data = load(rows, validation=None, on_bad_row="skip")
    assert data.labels.problem_type == "single_label_classification"
    assert [bad.where for bad in data.skipped] == ["row 2"]


@pytest.mark.parametrize("huge", [10**400, 1e300])
def test_a_number_that_training_cannot_hold_is_bad(huge):
    rows = [{"text": "a", "label": 0.5}, {"text": "b", "label": huge}]
    with pytest.raises(BadRow, match="row 2"):
        load(rows, validation=None)


def test_numbers_in_csv_are_numbers_and_class_numbers_are_classes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,0.5\nb,2\n")
    assert load(path, validation=None).labels.problem_type == "regression"
    path.write_text("text,label\na,1\nb,0\n")
    assert load(path, validation=None).labels.names == ("0", "1")


def test_a_chosen_label_column_has_its_own_names_not_those_of_a_column_called_label():
    kinds = {"label": datasets.ClassLabel(names=["no", "yes"]), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    features = datasets.Features({"text": datasets.Value("string"), **kinds})
    rows = datasets.Dataset.from_list([{"text": "x", "label": 1, "kind": 2}], features=features)
    data = load(rows, columns={"label": "kind"}, validation=None)
    assert data.labels is not None and data.labels.names == ("a", "b", "c")
    assert data.train["label"][:] == [2]


def test_declared_class_names_are_kept_and_an_unknown_id_is_bad():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": -1}], features=features)
    with pytest.raises(BadRow, match=r"row 2: label is -1; an id in 0\.\.1"):
        load(table, validation=None)
    data = load(table, validation=None, on_bad_row="skip")
    assert data.labels.names == ("no", "yes")
    assert list(data.train["label"]) == [1]


good_rows = st.builds(lambda text: json.dumps({"text": "x" + text}).encode(), st.text(max_size=20))
bad_rows = st.one_of(
    st.sampled_from([b"{", b"[]", b"null", b'{"text": 1}', b'{"text": ""}', b'{"other": "x"}', b'"x"', b"\xff\xfe"]),
    st.binary(min_size=1, max_size=30).filter(lambda raw: raw.strip() and not set(raw) & {10, 13}),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), good_rows, bad_rows), min_size=1, max_size=12))
def test_exactly_the_bad_lines_are_skipped(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b"".join((good if ok else bad) + b"\n" for ok, good, bad in rows))
    data = load(path, validation=None, on_bad_row="skip")
    expected = [number for number, (ok, *_) in enumerate(rows, start=2) if not ok]
    assert [int(bad.where.rpartition(" ")[2]) for bad in data.skipped] == expected
    assert len(data.train) == 1 + len(rows) - len(expected)
