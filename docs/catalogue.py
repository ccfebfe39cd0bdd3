"""Writes the table of methods into README.md from the registry: `python docs/catalogue.py`.

A test holds the README against what this would write.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from deltaworks import methods

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: written by docs/catalogue.py -->", "<!-- end of methods -->"


def table() -> str:
    """The catalogue as Markdown."""
    lines = ["| method | family | paper | merges | needs data | what it is |", "|---|---|---|---|---|---|"]
    for slug, cls in methods().items():
        page = sys.modules[cls.__module__].__doc__ or ""
        title = re.split(r" \(|\. |$", page.strip().splitlines()[0], maxsplit=1)[0].rstrip(".")
        paper = (
            f"[{cls.paper}](https://arxiv.org/abs/{cls.paper})"
            if re.match(r"\d{4}\.\d{4,5}$", cls.paper)
            else cls.paper
        )
        merges, data = ("yes" if cls.mergeable else "no"), ("yes" if cls.needs_data else "")
        lines.append(f"| `{slug}` | {cls.family} | {paper} | {merges} | {data} | {title} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """README with the table as it should be."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{table()}\n{text[end:]}"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
