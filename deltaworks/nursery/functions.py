"""The standard library's functions, one by one, as source text with what has been parsed of it.

Functions are cut out by their indentation and parsed alone, as parsing whole modules takes several times as long. What
cannot be cut so (a string that goes further left than the function) does not parse, and is left out.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from deltaworks.nursery import corpus

LONGEST_LINES, LONGEST = 40, 1500  # of a function, in lines and letters; longer ones are of no use to small bases
_OPENING = re.compile(r"( *)(class|def|async def) (\w+)")


@dataclass(frozen=True)
class Function:
    """A function or method of the standard library, its source moved to the left margin."""

    module: str
    """Top-level module or package, e.g. `asyncio`."""
    unit: str
    """What it is a part of: the file, and the class if there is one, e.g. `asyncio/queues.py:Queue`."""
    name: str
    source: str
    """From `def` to the last statement, without decorators."""
    documented: int
    """How many lines of `source` the header and the documentation string take."""
    header: int
    """How many lines of `source` the header takes."""
    text: str | None
    """The documentation string."""

    @property
    def owner(self) -> str:
        """The class it is a method of, or nothing."""
        return self.unit.partition(":")[2]

    @property
    def body(self) -> str:
        """The statements after the documentation string, with their comments."""
        return "\n".join(self.source.split("\n")[self.documented :])

    @property
    def head(self) -> str:
        """The header and the documentation string."""
        return "\n".join(self.source.split("\n")[: self.documented])

    @property
    def bare(self) -> str:
        """The function without its documentation string."""
        return "\n".join([*self.source.split("\n")[: self.header], self.body])


@cache
def functions() -> tuple[Function, ...]:
    """Every function that is short enough, in the corpus's order. Read once per process."""
    return tuple(found for document in corpus.sources() for found in inside(document))


def inside(document: corpus.Document) -> Iterator[Function]:
    """The functions of a source file, methods and inner functions among them."""
    lines = document.text.expandtabs().split("\n")
    owners: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        opening = _OPENING.match(line)
        if opening is None:
            continue
        indent, name = len(opening[1]), opening[3]
        owners = [(depth, owner) for depth, owner in owners if depth < indent]
        if opening[2] == "class":
            owners.append((indent, name))
            continue
        source = _cut(lines, number, indent)
        if source is None or len(source) > LONGEST:
            continue
        node = parsed(source)
        if node is None:
            continue
        unit = f"{document.name}:{owners[-1][1]}" if owners else document.name
        text = ast.get_docstring(node)
        first = node.body[0]
        header = first.lineno - 1
        if header == 0:
            continue  # all on one line: nothing stands below its header
        documented = (first.end_lineno or 0) if text is not None else header
        if text is not None and len(node.body) == 1:
            continue
        yield Function(document.module, unit, name, source, documented, header, text)


def _cut(lines: Sequence[str], start: int, indent: int) -> str | None:
    """The lines that belong to the definition at `start`, or None when there are too many."""
    last = start
    for number in range(start + 1, len(lines)):
        line = lines[number].lstrip()
        if not line or line.startswith("#"):
            continue  # kept when a line of the function follows
        if len(lines[number]) - len(line) <= indent and not line.startswith(")"):
            break
        last = number
        if last - start >= LONGEST_LINES:
            return None
    return textwrap.dedent("\n".join(lines[start : last + 1]))


def parsed(source: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function that a source is, or None when it is not exactly one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in old modules
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError):
            return None
    if len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return body[0]
    return None
