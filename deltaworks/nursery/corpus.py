"""The text that is on every machine: the Python standard library's own source and documentation.

Modules are divided once, by a hash of their top-level name, into training and validation modules. Everything the
nursery makes keeps to that division, so a validation example never comes from a module that a base was trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation"]

# Tests are excluded as they are mostly repetition; character tables and build settings are data, not prose or code.
SKIPPED_PARTS = frozenset({
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__", "encodings",
    "pydoc_data",
})  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "this", "antigravity", "__hello__")

# The C-accelerated modules' Python twins repeat the docstrings of the module they stand in for.
TWINS = {"_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime", "_strptime": "datetime"}


@dataclass(frozen=True)
class Document:
    """One text of the standard library."""

    module: str
    """Top-level module or package, e.g. `asyncio`."""
    name: str
    """Path inside the library, e.g. `asyncio/queues.py`."""
    text: str


def split_of(module: str) -> Split:
    """Which side of the division a top-level module is on (one in ten is held out)."""
    twin = TWINS.get(module, module).lstrip("_")
    return "validation" if hashlib.sha256(twin.encode()).digest()[0] % 10 == 0 else "train"


def sources() -> Iterator[Document]:
    """The standard library's source files, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_PARTS.intersection(parts) or parts[0].startswith(SKIPPED_PREFIXES):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield Document(parts[0].removesuffix(".py"), "/".join(parts), text)


def topics() -> Iterator[Document]:
    """The language reference that `help()` shows, one document per topic."""
    try:
        from pydoc_data import topics as reference
    except ImportError:  # some distributions package the documentation apart
        return
    for name, text in sorted(reference.topics.items()):
        yield Document("pydoc_data", f"topics/{name}", text)


@cache
def documents(split: Split) -> tuple[Document, ...]:
    """Every text of one side of the division; the language reference belongs to the training side."""
    found = (document for document in sources() if split_of(document.module) == split)
    return (*found, *topics()) if split == "train" else tuple(found)
