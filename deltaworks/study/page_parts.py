"""What all result pages are made of: one HTML file that needs nothing beside it, with tables and pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

PART = 'role="region" tabindex="0"'
COLOURS = ("#2563eb", "#d9480f", "#0f8a5f", "#9333ea", "#c2255c", "#0c8599", "#9a6b00", "#5c677d", "#e64980", "#4c6ef5")


def safe(text: Any) -> str:
    """Text as HTML shows it."""
    return html.escape(str(text))


def document(title: str, header: str, sections: Iterable[str], numbers: Mapping[str, Any], script: str) -> str:
    """A whole page.

    Args:
        title: plain text.
        header: HTML below the title.
        sections: HTML of the parts; empty ones are left out.
        numbers: what the script draws from.
        script: the file beside this one that draws.

    Raises:
        ImportError: when plotly is missing; the message says how to install it.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ImportError("the page needs a package that is not installed: pip install 'deltaworks[study]'") from None
    own = files(__spec__.parent)
    read = {name: (own / name).read_text(encoding="utf-8") for name in ("page.css", "charts.js", script)}
    # "</" would end the element that holds the numbers.
    held = json.dumps(numbers, ensure_ascii=False).replace("</", "<\\/")
    body = "\n".join([
        '<a class="skip" href="#results">Skip to the results</a>',
        f"<header><div><h1>{safe(title)}</h1>{header}</div></header>", "<main>", *filter(None, sections), "</main>",
    ])  # fmt: skip
    scripts = "\n".join(f"<script>{text}</script>" for text in (get_plotlyjs(), read["charts.js"], read[script]))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{safe(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{read["page.css"]}</style></head>\n'
        f'<body>{body}\n<script type="application/json" id="numbers">{held}</script>\n{scripts}</body></html>\n'
    )


def framed(label: str, table: str, more: str = "") -> str:
    """A table that scrolls by itself, by keyboard too, where it is wider than the page."""
    return f'<div class="scroll" {PART} aria-label="{safe(label.strip())}" {more}>{table}</div>'


def table(caption: str, heads: Iterable[str], rows: str) -> str:
    """A table with a caption and column heads."""
    columns = "".join(f'<th scope="col">{safe(head)}</th>' for head in heads)
    head = f"<caption><span>{safe(caption)}</span></caption><thead><tr>{columns}</tr></thead>"
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def sortable(caption: str, heads: Iterable[str], rows: str, by: int, *, descending: bool) -> str:
    """A table whose column heads sort; its rows come sorted by one of them."""
    way = f' aria-sort="{"descending" if descending else "ascending"}"'
    cells = "".join(
        f'<th scope="col"{way if place == by else ""}><button type="button">{safe(head)}</button></th>'
        for place, head in enumerate(heads)
    )
    head = f"<caption><span>{safe(caption)}</span></caption><thead><tr>{cells}</tr></thead>"
    return f'<table class="sortable">{head}<tbody>{rows}</tbody></table>'


def figure(id: str, title: str, caption: str, *, wide: bool = False, told: str | None = None) -> str:
    """A place for a picture; `caption` is HTML, `told` says in words what the picture shows."""
    return (
        f"<figure{' class=wide' if wide else ''}><h3>{safe(title)}</h3>"
        f'<div class="plot" id="{id}" role="img" aria-label="{safe(told or title)}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def lines(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A table in Markdown."""
    heads = list(heads)
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(map(cell, row))} |" for row in rows),
    ]


def cell(text: Any) -> str:
    """Text within a table of Markdown."""
    return str(text).replace("|", "\\|").replace("\n", " ")
