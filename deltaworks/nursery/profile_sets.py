"""Data of users with a profile: what one wrote before is there, beside what is to be written (LaMP's design).

A user is a package of the standard library, and its documentation strings are what its authors wrote. The packages are
those that the nursery's text bases have not seen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from deltaworks.nursery import sets

Row = dict[str, str]
USERS = ("collections", "email", "inspect", "logging")
SHOWN = (1, 4)
"""Items of the profile in front of a row, a column for each."""
PROMPT_LENGTH, COMPLETION_LENGTH = 160, 100
"""Letters: four items of a profile fit in front of another into the context of every text base."""


def profile(users: Sequence[str] = USERS) -> DatasetDict:
    """A function's signature -> the first paragraph of its documentation string, for users with a profile.

    A quarter of each user's rows, chosen by a hash, is held out; the others are the user's profile, and what a method
    trains on.

    Columns: `prompt`; `completion`; `module`, the user; `prompt_1` and `prompt_4`, the prompt with the one item or the
    four of its user's profile in front that are most like it by BM25, the most alike last, as they would stand in a
    file. A row of the profile is never in front of itself.

    Raises:
        ImportError: when scikit-learn is missing.
    """
    rows: dict[str, list[Row]] = {"train": [], "validation": []}
    known: list[Any] = list(sets.docstrings()["validation"])
    for user in users:
        once: dict[str, Row] = {
            row["prompt"]: row for row in known
            if row["module"] == user and len(row["prompt"]) <= PROMPT_LENGTH
            and len(row["completion"]) <= COMPLETION_LENGTH
        }  # fmt: skip
        own = sorted(once.values(), key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
        items = [row for place, row in enumerate(own) if place % 4]
        rows["train"] += _retrieved(items, items)
        rows["validation"] += _retrieved(own[::4], items)
    return DatasetDict({name: Dataset.from_list(found) for name, found in rows.items()})


def group(name: str, user: str) -> DatasetDict:
    """The rows of one user.

    Raises:
        ValueError: for a user that there is not.
        ImportError: as `profile`.
    """
    if user not in USERS:
        raise ValueError(f"nursery:{name}/{user}: there is no such user; there are {', '.join(USERS)}")
    return profile((user,))


def _retrieved(rows: Sequence[Row], items: Sequence[Row]) -> list[Row]:
    """Rows with what `SHOWN` says."""
    scores = bm25([row["prompt"] for row in rows], [item["prompt"] + item["completion"] for item in items])
    made = []
    for row, alike in zip(rows, scores, strict=True):
        best = [items[index] for index in np.argsort(-alike, kind="stable") if items[index] is not row]
        texts = [f'{item["prompt"]}{item["completion"]}"""\n\n' for item in best]
        made.append(row | {f"prompt_{count}": "".join(texts[:count][::-1]) + row["prompt"] for count in SHOWN})
    return made


def words(text: str) -> list[str]:
    """The words of code, names taken apart: `getMessage_id` is get, message, id."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", text)]


def bm25(queries: Sequence[str], texts: Sequence[str], k: float = 1.5, b: float = 0.75) -> np.ndarray:
    """How alike each query and each text are, `queries x texts` (Okapi BM25; Robertson and Zaragoza 2009).

    Args:
        queries, texts: code or prose.
        k: how soon a word that occurs again counts no more.
        b: how far a text's length counts, 0 to 1.

    Raises:
        ImportError: when scikit-learn is missing.
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer
    except ImportError as error:
        raise ImportError(f"nursery:profile needs {error.name}: pip install 'deltaworks[vision]'") from error
    counter: Any = CountVectorizer(analyzer=words)  # type: ignore[arg-type]
    counts = counter.fit_transform(texts).toarray().astype(float)
    asked = counter.transform(queries).toarray().astype(float)
    having = (counts > 0).sum(0)
    rarity = np.log1p((len(texts) - having + 0.5) / (having + 0.5))
    length = counts.sum(1, keepdims=True)
    weights = counts * (k + 1) / (counts + k * (1 - b + b * length / length.mean()))
    return asked @ (rarity * weights).T


SETS = {"profile": profile}
