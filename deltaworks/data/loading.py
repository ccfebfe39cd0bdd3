"""From a source to canonical rows: read, recognised, checked, split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Json, List, Value

from .bad_rows import BadRow, Gate, Located, OnBadRow, Unfit
from .formats import FORMATS, Format, Row, recognise
from .labels import Labels, Problem, encode, understand
from .sources import Split, open_source

_LOOK_AHEAD = 100  # rows looked at for the first one whose columns are known

# What Arrow would guess from the first rows only, or could not hold (messages with different fields).
_IMAGE = {
    "path": Value("string"),
    "bytes": Value("binary"),
    "pixels": List(Value("float32")),
    "shape": List(Value("int64")),
}
_LABEL: dict[Problem, Any] = {
    "single_label_classification": Value("int64"),
    "multi_label_classification": List(Value("int64")),
    "regression": Value("float32"),
}


@dataclass(frozen=True)
class Data:
    """Canonical rows, ready for `prepare`.

    - `train`, `validation`: data sets with the canonical columns of `format` (see `formats`).
    - `labels`: what the labels mean, where the format has labels.
    - `skipped`: the bad rows that were left out, with their places.
    - `places`: per split, the file and line each row came from.
    - `on_bad_row`: what to do with rows that prove bad only later, when they are tokenised.
    """

    train: Dataset
    validation: Dataset | None
    format: str
    labels: Labels | None = None
    skipped: list[BadRow] = field(default_factory=list)
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)
    on_bad_row: OnBadRow = "stop"

    def place(self, split: str, index: int) -> str:
        """Where a row of `split` came from."""
        return self.places[split][index] if split in self.places else f"{split} row {index + 1}"

    def __str__(self) -> str:
        held_out = f", {len(self.validation)} held out" if self.validation is not None else ""
        left_out = f", {len(self.skipped)} bad rows left out" if self.skipped else ""
        return f"{len(self.train)} rows of {self.format}{held_out}{left_out}"


def load(
    source: Any,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    validation: float | str | Path | None = 0.1,
    on_bad_row: OnBadRow = "stop",
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    """Reads training data and brings it to canonical form.

    **Arguments:**

    - `source`: see `sources.open_source`.
    - `format`: one of `FORMATS`; recognised from the columns when not given.
    - `columns`: canonical column -> the data's own name for it, e.g. `{"prompt": "question"}`.
    - `split`: which of the source's splits is trained on.
    - `validation`: a share of the rows in [0, 1), or a file, or the name of a split. A split that the source itself
      calls validation is taken before a share. `None` or 0: nothing is held out.
    - `on_bad_row`: `"stop"` raises at the first bad row, `"skip"` leaves bad rows out and lists them in `skipped`.
    - `limit`: at most this many training rows are read.
    - `seed`: decides which rows a share holds out, together with their number only.

    **Raises:** `ValueError` (`BadRow` for a row) or `FileNotFoundError`, in one line.
    """
    gate = Gate(on_bad_row)
    splits = open_source(source)
    train_split = _pick(splits, split, source)
    if isinstance(validation, bool) or (isinstance(validation, int | float) and not 0 <= validation < 1):
        raise ValueError(f"validation is {validation}; a share in [0, 1), a file or a split's name is needed")
    validation_split = None
    if isinstance(validation, str | Path):
        held = str(validation)
        validation_split = splits[held] if held in splits else _pick(open_source(validation), "train", validation)
    elif validation and split != "validation":
        validation_split = splits.get("validation")

    train, shape = _canonical(train_split, format, columns, gate, limit, source)
    held_out: list[tuple[str, Row]] = []
    if validation_split is not None:
        held_out, _ = _canonical(validation_split, shape.name, columns, gate, None, validation)
    labels = None
    if shape.name in ("text-label", "image-label", "tokens-tags"):
        labels, train, held_out = _with_labels(shape, train_split, train, held_out, gate, columns)
    if not train:
        raise ValueError(_nothing_left(source, gate))
    if validation_split is None and isinstance(validation, int | float) and validation > 0 and len(train) > 1:
        train, held_out = _hold_out(train, validation, seed)
    name = "chat" if "messages" in train[0][1] else shape.name
    return Data(
        train=_stored(train, labels),
        validation=_stored(held_out, labels) if held_out else None,
        format=name,
        labels=labels,
        skipped=gate.skipped,
        places={"train": [where for where, _ in train], "validation": [where for where, _ in held_out]},
        on_bad_row=on_bad_row,
    )


def _pick(splits: Mapping[str, Split], name: str, source: Any) -> Split:
    if name in splits:
        return splits[name]
    if name == "train" and len(splits) == 1:
        return next(iter(splits.values()))
    raise ValueError(f"{_named(source)}: no split {name!r}; there are {', '.join(sorted(splits)) or 'none'}")


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the given {type(source).__name__}"


def _canonical(
    split: Split, name: str | None, columns: Mapping[str, str] | None, gate: Gate, limit: int | None, source: Any
) -> tuple[list[tuple[str, Row]], Format]:
    """Parsed rows with their places, and the format they have."""
    rows = split.read()
    ahead: list[Located] = list(islice(rows, _LOOK_AHEAD))
    shape = _shape(ahead, name, columns, source, gate)
    parsed: list[tuple[str, Row]] = []
    for where, row in gate.good(_chain(ahead, rows)):
        if limit is not None and len(parsed) >= limit:
            break
        try:
            parsed.append((where, _parse(row, shape, columns, split.folder)))
        except Unfit as error:
            gate.refuse(BadRow(where, str(error)))
    chats = [("messages" in row) for _, row in parsed]
    if any(chats) and not all(chats):
        raise ValueError(f"{_named(source)}: some rows are chats and some are not ({sum(chats)} of {len(chats)})")
    return parsed, shape


def _chain(first: Iterable[Located], rest: Iterable[Located]) -> Iterable[Located]:
    yield from first
    yield from rest


def _shape(
    ahead: list[Located], name: str | None, columns: Mapping[str, str] | None, source: Any, gate: Gate
) -> Format:
    readable = [row for _, row in ahead if not isinstance(row, BadRow)]
    if not readable:
        for _, row in ahead:
            if isinstance(row, BadRow):
                gate.refuse(row)
        raise ValueError(_nothing_left(source, gate))
    if columns:
        present = {key for row in readable for key in row}
        for own in columns.values():
            if own not in present:
                raise ValueError(f"{_named(source)}: no column {own!r}; there are {', '.join(sorted(present))}")
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"format is {name!r}; known are {', '.join(FORMATS)}")
        return FORMATS[name]
    first_error = None
    for row in readable:
        try:
            return recognise(list(_renamed(row, columns)))[0]
        except ValueError as error:
            first_error = first_error or error
    raise ValueError(f"{_named(source)}: {first_error}")


def _renamed(row: Row, columns: Mapping[str, str] | None) -> Row:
    """The row with its own names replaced by the canonical ones that `columns` gives them."""
    if not columns:
        return row
    canonical = {own: name for name, own in columns.items()}
    kept = {key: value for key, value in row.items() if key in canonical or key not in columns}
    return {canonical.get(key, key): value for key, value in kept.items()}


def _parse(row: Row, shape: Format, columns: Mapping[str, str] | None, folder: Path | None) -> Row:
    renamed = _renamed(row, columns)
    found = shape.match(renamed)
    if found is None:
        missing = [
            name
            for name, aliases in shape.columns.items()
            if name not in shape.optional and not {name, *aliases} & {key.lower() for key in renamed}
        ]
        there = ", ".join(map(str, renamed)) or "none"
        raise Unfit(f"{' and '.join(missing)} missing, which {shape.name} needs; the columns are {there}")
    given = {name: renamed[own] for name, own in found.items()}
    if shape.name == "prompt-completion" and isinstance(given["prompt"], list):
        return FORMATS["chat"].parse(given, folder)
    return shape.parse(given, folder)


def _with_labels(
    shape: Format,
    split: Split,
    train: list[tuple[str, Row]],
    held_out: list[tuple[str, Row]],
    gate: Gate,
    columns: Mapping[str, str] | None,
) -> tuple[Labels, list[tuple[str, Row]], list[tuple[str, Row]]]:
    """Labels understood over all rows, and every row's label replaced by its id or number."""
    column = "tags" if shape.name == "tokens-tags" else "label"
    named = (columns or {}).get(column)
    own = {named} if named else {column, *shape.columns[column]}
    declared = next((names for name, names in split.names.items() if name in own), None)
    rows = [*train, *held_out]
    if column == "tags":
        tags = understand([tag for _, row in rows for tag in row["tags"]], declared, only_text=False)
        labels = Labels("single_label_classification", tags.names)
    else:
        labels = understand([row["label"] for _, row in rows], declared, split.only_text)

    def encoded(part: list[tuple[str, Row]]) -> list[tuple[str, Row]]:
        kept = []
        for where, row in part:
            try:
                if column == "tags":
                    row[column] = [encode(tag, labels, declared is not None) for tag in row[column]]
                else:
                    row[column] = encode(row[column], labels, declared is not None)
                kept.append((where, row))
            except Unfit as error:
                gate.refuse(BadRow(where, str(error)))
        return kept

    return labels, encoded(train), encoded(held_out)


def _hold_out(rows: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    count = min(len(rows) - 1, max(1, round(share * len(rows))))
    chosen = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )


def _stored(rows: list[tuple[str, Row]], labels: Labels | None) -> Dataset:
    plain = [row for _, row in rows]
    features: dict[str, Any] = {}
    # Optional columns may be missing from the first rows.
    for column, value in {name: value for row in reversed(plain) for name, value in row.items()}.items():
        if column == "image":
            features[column] = _IMAGE
        elif column == "label" and labels is not None:
            kind = _LABEL[labels.problem_type]
            features[column] = List(kind) if kind == _LABEL["regression"] and isinstance(value, list) else kind
        elif column == "tags":
            features[column] = List(Value("int64"))
        elif column == "answer":
            features[column] = Value("int64")
        elif isinstance(value, list) and isinstance(value[0], dict):
            features[column] = List(Json())
        else:
            features[column] = List(Value("string")) if isinstance(value, list) else Value("string")
    columns = {name: [row.get(name) for row in plain] for name in features}
    return Dataset.from_dict(columns, features=Features(features))


def _nothing_left(source: Any, gate: Gate) -> str:
    if not gate.skipped:
        return f"{_named(source)}: no rows"
    return f"{_named(source)}: no usable row; all {len(gate.skipped)} are bad, the first is {gate.skipped[0]}"
