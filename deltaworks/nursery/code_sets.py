"""Tasks on real code: the standard library's functions, their documentation and their tests.

| set | from | to |
|---|---|---|
| `functions` | header and documentation string | body |
| `summaries` | function | first paragraph of its documentation string |
| `tests` | function and the name of a test | body of that test, from Python's `test` package |
| `programs` | description and tests (made, see `programs`) | body |
| `defects` | function | whether its comparisons or its numbers were made wrong |
| `clones` | two functions | whether the second is the first in other words |
| `search` | documentation, function | whether it describes that function |

The functions of `defects` and `clones` are short and what is wrong or different in them shows in more than one token:
so a base of a million parameters reads a row whole (99 of 100 are below 130 tokens) and begins to learn in a hundred
steps. A single fault, or a function against its neighbour in the file, it does not learn in that time, nor `search`.

Held-out rows are of modules that no base has read (`corpus`), except in `programs`; of these are at most `HELD_OUT`
(`LABELLED_OUT` where there is a label). No target occurs twice. Rows stand in the order of a hash, so the first hundred
are of all modules. `module` is the top-level package of a row, and `group` gives the rows of one package alone.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from deltaworks.nursery import corpus, rewriting, sets
from deltaworks.nursery import functions as sources
from deltaworks.nursery import programs as made
from deltaworks.nursery.functions import Function, functions
from deltaworks.nursery.kept import kept

Row = dict[str, Any]

HELD_OUT, LABELLED_OUT, MOST = 240, 600, 6000
BODY, HEAD, WHOLE = range(20, 401), range(30, 601), range(60, 501)  # letters
UNWRITTEN = range(50, 701)  # letters before `ast` writes it, comments and all
BRIEF = range(40, 181)  # letters as `ast` writes it
LIMITS: tuple[rewriting.Fault, ...] = ("comparison", "off by one")
SHORTEST_GROUP = 20
PROGRAMS = (1200, 240)
CERTAIN = 6  # letters of a single word with which a test's longer name may begin by chance no more

Source = Callable[[], Iterable[Row]]
"""What makes the rows of a set: its columns, with `module`, `unit` (what may not be divided) and `key` (the target)."""


def whole(name: str) -> DatasetDict:
    """The set `name` of `SETS`.

    Raises:
        ImportError: `tests` where Python came without its `test` package.
    """
    names = LABELS.get(name)
    if name == "programs":
        rows = made.programs(sum(PROGRAMS))
        return _set({"train": rows[: PROGRAMS[0]], "validation": rows[PROGRAMS[0] :]}, names)
    return _set(_divided(_kept(name), labelled=names is not None), names)


def group(name: str, package: str) -> DatasetDict:
    """The rows of a set that are of one package, with splits of their own.

    A fifth of the rows, in whole classes and files, is held out. `corpus.split_of` says whether the bases have read the
    package; of `tests` they have read none.

    Raises:
        ValueError: when the set has no groups, or the package not enough rows.
        ImportError: `tests` where Python came without its `test` package.
    """
    if name not in ROWS:
        raise ValueError(f"nursery:{name}/{package}: {name} has no groups; {', '.join(ROWS)} have")
    return _set(_in_group(_kept(name), name, package), LABELS.get(name))


def _set(splits: dict[str, list[Row]], names: Sequence[str] | None) -> DatasetDict:
    """Rows as a data set, without what only dividing them needs."""
    columns = [column for column in splits["train"][0] if column not in ("unit", "key")]
    features = Features({
        column: ClassLabel(names=list(names)) if column == "label" and names else Value("string") for column in columns
    })  # fmt: skip
    return DatasetDict({
        split: Dataset.from_dict({column: [row[column] for row in rows] for column in columns}, features=features)
        for split, rows in splits.items()
    })  # fmt: skip


def _divided(rows: Sequence[Row], *, labelled: bool) -> dict[str, list[Row]]:
    """Rows by the side that their module is on, a target only where it occurs first."""
    bounds = {"train": MOST, "validation": LABELLED_OUT if labelled else HELD_OUT}
    found: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for split, most in bounds.items():
        of_split = [row for row in rows if corpus.split_of(row["module"]) == split]
        found[split] = [row for row in of_split if row["key"] not in seen][:most]
        seen.update(row["key"] for row in of_split)
    return found


def _in_group(rows: Sequence[Row], name: str, package: str) -> dict[str, list[Row]]:
    """The rows of one package, a fifth of them held out in whole units.

    Raises:
        ValueError: for a package without enough rows.
    """
    counts = Counter(row["module"] for row in rows)
    found = [row for row in rows if row["module"] == package]
    units: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        units[row["unit"]].append(row)
    if len(found) < SHORTEST_GROUP or len(units) < 2:
        most = ", ".join(module for module, count in counts.most_common(12) if count >= SHORTEST_GROUP)
        raise ValueError(
            f"nursery:{name}/{package}: {len(found)} rows in {len(units)} classes or files are of this package; "
            f"at least {SHORTEST_GROUP} in 2 are needed, as of {most}"
        )
    splits: dict[str, list[Row]] = {"train": [], "validation": []}
    wanted = len(found) / 5
    for unit in sorted(units, key=_hash):
        some = units[unit]
        out = len(splits["validation"]) + len(some) <= wanted * 1.25
        splits["validation" if out else "train"] += some
    if not splits["validation"]:
        smallest = min(units, key=lambda unit: (len(units[unit]), unit))
        splits = {"train": [row for row in found if row["unit"] != smallest], "validation": units[smallest]}
    return {split: sorted(of_split, key=lambda row: _hash(row["key"])) for split, of_split in splits.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _draw(text: str) -> int:
    return int(_hash(text)[:15], 16)


# Rows that are made once


def _kept(name: str) -> list[Row]:
    """The rows of a set in the order of their hash."""
    return kept(name, lambda: sorted(_once(ROWS[name]()), key=lambda row: _hash(row["key"])))


def _once(rows: Iterable[Row]) -> list[Row]:
    """The first row of each target."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["key"], row)
    return list(found.values())


def _row(function: Function, key: str, **columns: Any) -> Row:
    return columns | {"module": function.module, "unit": function.unit, "key": key}


# Texts to write


def _functions() -> Iterator[Row]:
    """Header and documentation string -> body."""
    for one in functions():
        if one.text is None or len(one.body) not in BODY or len(one.head) not in HEAD:
            continue
        body = one.body + "\n"
        yield _row(one, body, prompt=one.head + "\n", completion=body)


def _summaries() -> Iterator[Row]:
    """Function -> first paragraph of its documentation string."""
    for one in functions():
        text = sets.summary(one.text or "")
        if len(one.bare) in WHOLE and len(text) in sets.SUMMARY_LENGTH and re.match(r"[A-Z][^(]* ", text):
            yield _row(one, text, prompt=f'{one.bare}\n\n"""', completion=text)


# Python's tests


def _tests() -> Iterator[Row]:
    """Function and header of a test -> body of the test, matched by their names as Methods2Test does (2203.12776).

    `test_json.py` and `test_json/` are of the module `json`; a test is of the function whose name its own begins with,
    after `test_`, the longest such; of several, the one whose class the test's class is named after.
    """
    by_name: dict[tuple[str, str], list[Function]] = defaultdict(list)
    for one in functions():
        if len(one.bare) in WHOLE:
            by_name[one.module, one.name.strip("_").lower()].append(one)
    for module, document in _test_files():
        for test in sources.inside(document):
            if not test.name.startswith("test_") or test.text is not None or len(test.body) not in BODY:
                continue
            focal = _focal(by_name, module, test)
            if focal is not None:
                body = test.body + "\n"
                header = "\n".join(test.source.split("\n")[: test.header])
                row = _row(focal, body, prompt=f"{focal.bare}\n\n{header}\n", completion=body)
                yield row | {"unit": test.unit}


def _test_files() -> Iterator[tuple[str, corpus.Document]]:
    """Python's own tests, with the module that each file is about.

    Raises:
        ImportError: when Python came without them.
    """
    root = Path(sysconfig.get_path("stdlib")) / "test"
    files = sorted(root.rglob("test_*.py"))
    if not files:
        raise ImportError(
            f"nursery:tests needs Python's own tests, which are not in {root}; install libpython3-testsuite (Debian, "
            "Ubuntu) or python3-test (Fedora), or take a Python from python.org, pyenv or uv"
        )
    modules = {one.module for one in functions()}
    for path in files:
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py").removeprefix("test_")
        if module in modules:
            text = path.read_text(encoding="utf-8", errors="replace")
            yield module, corpus.Document(module, "test/" + "/".join(parts), text)


def _focal(by_name: dict[tuple[str, str], list[Function]], module: str, test: Function) -> Function | None:
    """The function that a test is about, or None where its name says nothing certain."""
    words = test.name.removeprefix("test_").lower().split("_")
    for count in range(len(words), 0, -1):
        found = by_name.get((module, "_".join(words[:count])), [])
        about = re.sub(r"test(case|s)?|_", "", test.owner.lower())
        named = [one for one in found if one.owner and one.owner.lower().strip("_") in about] if about else []
        free = [one for one in found if not one.owner]
        certain = count == len(words) or count > 1 or len(words[0]) >= CERTAIN
        for choice in (named, free, found) if certain else (named,):
            if len(choice) == 1:
                return choice[0]
        if found:
            return None
    return None


# Functions to judge


def _defects() -> Iterator[Row]:
    """Function -> whether it is as its authors wrote it; in one half every comparison and every number is wrong."""
    for one in functions():
        draw = _draw(one.source)
        if len(one.bare) not in UNWRITTEN:
            continue
        found = rewriting.faulty(one.source, None, LIMITS)
        if found is None or len(found[0]) not in BRIEF:
            continue
        right, wrong, fault = found
        label = draw % 2
        yield _row(one, right, text=wrong if label else right, label=label, fault=fault if label else "")


def _clones() -> Iterator[Row]:
    """Two functions -> whether the second is the first in other words, or another of the same length.

    Both are of the same side of the corpus; that of another name that is nearest in length, by hash where many are.
    """
    for side in ("train", "validation"):
        found = [one for one in functions() if corpus.split_of(one.module) == side and len(one.bare) in BRIEF]
        found.sort(key=lambda one: (len(one.bare), _hash(one.source)))
        for one, other in zip(found, found[1:] + found[:1], strict=True):
            text, same = rewriting.renamed(one.source), rewriting.reworded(one.source)
            different = rewriting.reworded(other.source)
            # Some have no words to change, and two may be the same but for their name.
            if text is None or same is None or different is None or same in (text, different):
                continue
            label = _draw(one.source) % 2
            yield _row(one, text, text=text, text_pair=same if label else different, label=label)


def _search() -> Iterator[Row]:
    """Documentation and a function -> whether it describes this function, or another one of its file."""
    for one, other in _neighbours(range(60, 401), documented=True):
        text = sets.summary(one.text or "")
        if len(text) in sets.SUMMARY_LENGTH and text != sets.summary(other.text or ""):
            label = _draw(text) % 2
            yield _row(one, text, text=text, text_pair=(one if label else other).bare, label=label)


def _neighbours(length: range, *, documented: bool = False) -> Iterator[tuple[Function, Function]]:
    """Functions, each with that of another name in its file that is nearest to it in length."""
    by_file: dict[str, list[Function]] = defaultdict(list)
    for one in functions():
        if len(one.bare) in length and (one.text is not None or not documented):
            by_file[one.unit.partition(":")[0]].append(one)
    for found in by_file.values():
        for one in found:
            others = [other for other in found if other.name != one.name]
            if others:
                yield one, min(others, key=partial(_distance, len(one.bare)))


def _distance(size: int, other: Function) -> tuple[int, str]:
    return abs(len(other.bare) - size), other.source


ROWS: dict[str, Source] = {
    "functions": _functions,
    "summaries": _summaries,
    "tests": _tests,
    "defects": _defects,
    "clones": _clones,
    "search": _search,
}
LABELS = {
    "defects": ("correct", "defective"),
    "clones": ("different", "same"),
    "search": ("of another", "of this"),
}
SETS = {name: partial(whole, name) for name in (*ROWS, "programs")}
