"""Where rows come from: files, folders, Hugging Face data sets, the nursery, Python objects.

Every source becomes one iterator of located rows per split. A row that cannot be read is handed on as a `BadRow` that
knows its file and line; a file that cannot be read at all is an error.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bad_rows import BadRow, Located, shown

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Split:
    """Rows of one split, read anew each time.

    - `read`: starts an iterator of `(where, row or BadRow)`.
    - `names`: class names that the source itself declares, by column (`datasets.ClassLabel`).
    - `folder`: what relative paths in the rows are relative to.
    - `only_text`: the source knows no numbers (CSV).
    """

    read: Callable[[], Iterator[Located]]
    names: Mapping[str, list[str]] = field(default_factory=dict)
    folder: Path | None = None
    only_text: bool = False


def open_source(source: Any) -> dict[str, Split]:
    """The splits of a source, by name (`train`, `validation`, `test`, or as the source calls them).

    **Arguments:**

    - `source`: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`), a folder of such files, a folder of images by
      class, a folder written by `datasets.save_to_disk`, a Hugging Face data set (`name` or `name:config`),
      `nursery:NAME`, a `datasets.Dataset` or `DatasetDict`, a sequence of dicts, or a dict of these by split.

    **Raises:** `FileNotFoundError` or `ValueError` in one line.
    """
    import datasets

    if isinstance(source, datasets.Dataset):
        return {"train": _from_dataset(source, "data set")}
    if isinstance(source, Mapping):
        splits = {}
        for name, part in source.items():
            if isinstance(part, datasets.Dataset):
                splits[str(name)] = _from_dataset(part, str(name))
                continue
            opened = open_source(part)
            if len(opened) != 1:
                raise ValueError(f"split {name!r} has splits of its own: {', '.join(opened)}")
            splits[str(name)] = next(iter(opened.values()))
        return splits
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return {"train": Split(lambda: _from_sequence(source))}
    if not isinstance(source, str | Path):
        raise ValueError(
            f"data is a {type(source).__name__}; a file, a folder, a data set's name, a datasets.Dataset or a list of "
            "dicts is needed"
        )
    if isinstance(source, str) and source.startswith("nursery:"):
        from deltaworks import nursery

        return open_source(nursery.data(source.removeprefix("nursery:")))

    path = Path(source).expanduser()
    if path.is_file():
        return {"train": _from_files([path], path.parent)}
    if path.is_dir():
        return _from_folder(path)
    if path.suffix.lower() in _READERS or str(source).startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{source}: no such file or folder")
    return _from_hub(str(source))


def read_file(path: Path) -> Iterator[Located]:
    """Rows of one file, by its ending.

    **Raises:** `ValueError` when the ending is unknown or the file as a whole cannot be read.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: unknown kind of file; known are {', '.join(sorted(_READERS))}")
    return reader(path)


def _read_jsonl(path: Path) -> Iterator[Located]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path} line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield where, _as_row(json.loads(line.decode("utf-8")), where)
            except UnicodeDecodeError as error:
                byte = line[error.start]
                yield where, BadRow(where, f"byte {error.start} (0x{byte:02x}) is not UTF-8; save the file as UTF-8")
            except json.JSONDecodeError as error:
                wanted = "one JSON object per line is needed"
                yield where, BadRow(where, f"broken JSON at column {error.colno} ({error.msg}); {wanted}")
            except (RecursionError, ValueError) as error:
                yield where, BadRow(where, f"JSON that cannot be read ({error}); one flat JSON object is needed")


def _read_json(path: Path) -> Iterator[Located]:
    """A JSON list of objects; a file that does not begin with `[` is read as JSON lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    decoder = json.JSONDecoder()
    blank = re.compile(r"\s*")
    position = text.index("[") + 1
    line, counted = 1, 0
    while True:
        position = _end(blank, text, position)
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            return
        where = f"{path} line {line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # Where the next item begins cannot be known, so nothing after this one can be skipped to.
            raise BadRow(
                f"{path} line {error.lineno}",
                f"broken JSON at column {error.colno} ({error.msg}); a list of objects separated by commas is needed",
            ) from None
        except (RecursionError, ValueError) as error:
            raise BadRow(where, f"JSON that cannot be read ({error})") from None
        yield where, _as_row(value, where)
        position = _end(blank, text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise BadRow(f"{path} line {line}", "a comma or the closing ] is missing after this object")


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _as_row(value: Any, where: str) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(where, f"{shown(value)} is a {type(value).__name__}; an object with named fields is needed")


def _read_csv(path: Path) -> Iterator[Located]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Bytes that are not UTF-8 become lone surrogates, so that only the row that has them is bad.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path} line 1: the header cannot be read ({error})") from None
        if not header or not any(name.strip() for name in header):
            raise ValueError(f"{path} line 1: no header; the first line must name the columns")
        header = [name.strip() for name in header]
        if len(set(header)) < len(header) or "" in header:
            raise ValueError(f"{path} line 1: the column names {shown(header)} are not all different and non-empty")
        while True:
            where = f"{path} line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, BadRow(where, f"broken CSV ({error}); text that holds quotes or commas must be quoted")
                continue
            if not fields:
                continue
            if len(fields) != len(header):
                wanted = f"the header names {len(header)} ({', '.join(header)})"
                yield where, BadRow(where, f"{len(fields)} fields where {wanted}")
            elif any("\udc80" <= character <= "\udcff" for value in fields for character in value):
                yield where, BadRow(where, "bytes that are not UTF-8; save the file as UTF-8")
            else:
                yield where, dict(zip(header, fields, strict=True))


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
    number = 0
    with file:
        batches = file.iter_batches(batch_size=1024)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{path}: damaged after row {number} ({_first_line(error)})") from None
            if batch is None:
                return
            for index in range(batch.num_rows):
                number += 1
                where = f"{path} row {number}"
                try:
                    yield where, batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield where, BadRow(where, "a text that is not UTF-8")


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _from_sequence(rows: Sequence[Any]) -> Iterator[Located]:
    for number, row in enumerate(rows, start=1):
        where = f"row {number}"
        yield (
            where,
            {str(key): value for key, value in row.items()} if isinstance(row, Mapping) else _as_row(row, where),
        )


def _from_dataset(dataset: Any, name: str) -> Split:
    import datasets

    names = {}
    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            names[column] = list(inner.names)
        if isinstance(feature, datasets.Image):
            # Undecoded, so that an unreadable image is one bad row and not the end of the run.
            dataset = dataset.cast_column(column, datasets.Image(decode=False))

    def read() -> Iterator[Located]:
        for number, row in enumerate(dataset.with_format(None), start=1):
            yield f"{name} row {number}", dict(row)

    return Split(read, names)


def _from_folder(folder: Path) -> dict[str, Split]:
    import datasets

    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise ValueError(f"{folder}: a saved data set that cannot be loaded ({_first_line(error)})") from None
        parts = saved if isinstance(saved, dict) else {"train": saved}
        return {str(name): _from_dataset(part, f"{folder} {name}") for name, part in parts.items()}

    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _READERS)
    if files:
        groups: dict[str, list[Path]] = {}
        for path in files:
            groups.setdefault(_split_of(path.stem) or "", []).append(path)
        unnamed = groups.pop("", [])
        if unnamed and "train" in groups:
            raise ValueError(
                f"{unnamed[0]}: belongs to no split while {groups['train'][0].name} is the train split; name it after "
                "train, validation or test, or move it away"
            )
        if unnamed:
            groups["train"] = unnamed
        return {name: _from_files(paths, folder) for name, paths in groups.items()}

    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_split = {split: path for path in subfolders if (split := _split_of(path.name))}
    if not by_split:
        by_split = {"train": folder}
    found = {split: _image_folder(path) for split, path in by_split.items() if _images_by_class(path)}
    if found:
        return found
    raise ValueError(
        f"{folder}: no data in this folder; it needs {', '.join(sorted(_READERS))} files, a data set saved by "
        "`datasets`, or one folder of images per class"
    )


def _split_of(stem: str) -> str | None:
    """The split a file or folder is named after: `train`, `my_valid`, `test-00000-of-00002`."""
    for word in re.split(r"[^a-z]+", stem.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def _from_files(paths: list[Path], folder: Path) -> Split:
    def read() -> Iterator[Located]:
        for path in paths:
            yield from read_file(path)

    return Split(read, folder=folder, only_text=all(path.suffix.lower() in (".csv", ".tsv") for path in paths))


def _images_by_class(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGES)


def _image_folder(folder: Path) -> Split:
    def read() -> Iterator[Located]:
        for path in _images_by_class(folder):
            yield str(path), {"image": str(path), "label": path.parent.name}

    return Split(read)


def _from_hub(name: str) -> dict[str, Split]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None)
    except Exception as error:
        raise ValueError(
            f"{name}: no local file or folder of that name, and the Hugging Face data set cannot be loaded "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from None
    return {str(split): _from_dataset(part, f"{name} {split}") for split, part in loaded.items()}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
