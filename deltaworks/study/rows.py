"""Rows, the results of trials, and the folder that keeps them by the trial's key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROW = "row.json"


def stored(cache: Path, key: str) -> Row | None:
    """The row of a trial that was run before."""
    try:
        return json.loads((cache / key / ROW).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store(cache: Path, key: str, row: Row) -> None:
    """Keep a row; the file appears whole or not at all."""
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{ROW}.{os.getpid()}"
    part.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    part.replace(folder / ROW)


def failed(error: BaseException | str) -> Row:
    """The row of a trial that has no result."""
    if isinstance(error, str):
        return {"status": "failed", "error": error}
    said = " ".join(str(error).split()) or type(error).__name__
    plain = isinstance(error, (ValueError, OSError, ImportError))
    return {"status": "failed", "error": said if plain else f"{type(error).__name__}: {said}"}
