"""Rows that cannot be used: where they are, what is wrong, and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

OnBadRow = Literal["stop", "skip"]


class BadRow(ValueError):
    """One row that cannot be used.

    **Arguments:**

    - `where`: file and line (`train.jsonl line 12`), or file and row, counted from 1.
    - `problem`: what is wrong and what would be right, one line.
    """

    def __init__(self, where: str, problem: str):
        self.where = where
        self.problem = " ".join(problem.split())
        super().__init__(f"{where}: {self.problem}")


class Unfit(ValueError):
    """What a parser raises about a row without knowing where the row is."""


Located = tuple[str, dict[str, Any] | BadRow]
"""A row with its place, or why there is none at that place."""


class Gate:
    """Lets good rows through and treats bad ones as `on_bad_row` says: the first one stops, or all are counted."""

    def __init__(self, on_bad_row: OnBadRow):
        if on_bad_row not in ("stop", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}; it takes 'stop' or 'skip'")
        self.on_bad_row = on_bad_row
        self.skipped: list[BadRow] = []

    def refuse(self, bad: BadRow) -> None:
        """Raises `bad`, or counts it."""
        if self.on_bad_row == "stop":
            raise BadRow(bad.where, f"{bad.problem} (to leave such rows out: on_bad_row='skip', --on-bad-row skip)")
        self.skipped.append(bad)

    def good(self, rows: Iterable[Located]) -> Iterable[tuple[str, dict[str, Any]]]:
        """The rows that could be read."""
        for where, row in rows:
            if isinstance(row, BadRow):
                self.refuse(row)
            else:
                yield where, row


def shown(value: Any, limit: int = 60) -> str:
    """A value as an error message shows it: its `repr`, cut."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
