"""The pages of a study: one HTML file that needs nothing beside it, Markdown, and pictures for papers."""

from __future__ import annotations

import json
from pathlib import Path

from .compare import Comparison, write
from .page_parts import COLOURS, PART, document, figure, framed, safe, sortable
from .page_parts import cell as cell_of
from .page_parts import table as plain_table
from .summary import ALWAYS, COSTS, UNITS, Summary, cost_text, direction, interval, sentences, short, summarise
from .trial import BASE, CONTEXT

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "pentagon", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
DRAWN = {
    "circle": '<circle cx="6" cy="6" r="4.6"/>',
    "square": '<rect x="2" y="2" width="8" height="8"/>',
    "diamond": '<path d="M6 .8 11.2 6 6 11.2 .8 6z"/>',
    "triangle-up": '<path d="M6 1 11.4 10.6H.6z"/>',
    "x": '<path d="m1.4 3.2 1.8-1.8L6 4.2l2.8-2.8 1.8 1.8L7.8 6l2.8 2.8-1.8 1.8L6 7.8l-2.8 2.8-1.8-1.8L4.2 6z"/>',
    "pentagon": '<path d="M6 .8 11.3 4.7 9.3 11H2.7L.7 4.7z"/>',
    "star": '<path d="m6 .6 1.5 3.7 4 .3-3 2.6.9 3.9L6 9l-3.4 2.1.9-3.9-3-2.6 4-.3z"/>',
}
BUTTONS = "".join(
    f'<button class="plain" type="button" data-all="{value}">{text}</button> '
    for value, text in (("yes", "all"), ("no", "none"))
)


def save(found: Comparison, folder: str | Path) -> Path:
    """Write all of a study: `results.parquet`, `study.yaml`, `summary.json`, `report.html`, `report.md`, `pictures/`.

    Returns:
        The HTML page's path.

    Raises:
        ImportError: when plotly or matplotlib is missing; the message says how to install them.
    """
    folder = Path(folder)
    write(found, folder)
    summary = summarise(found)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(summary, found.study.text()), encoding="utf-8")
    from .pictures import pictures

    drawn = pictures(summary, folder / "pictures")
    (folder / "report.md").write_text(markdown(summary, [path.relative_to(folder) for path in drawn]), encoding="utf-8")
    return folder / "report.html"


def names_of(summary: Summary) -> list[str]:
    """Everything that was compared, in order of the first cell."""
    return list(dict.fromkeys(one["name"] for cell in summary["cells"] for one in cell["methods"]))


def looks(names: list[str]) -> dict[str, dict[str, str]]:
    """A colour, a symbol and a dash for each method, so that none is told by its colour alone."""
    trained = [name for name in names if name not in (BASE, CONTEXT)]
    given = {
        name: {
            "hex": COLOURS[index % len(COLOURS)],
            "symbol": SYMBOLS[(index + index // len(COLOURS)) % len(SYMBOLS)],
            "dash": DASHES[(index // len(COLOURS)) % len(DASHES)],
        }
        for index, name in enumerate(trained)
    }
    grey = {"hex": "#7a8594", "dash": "dot"}
    return {name: given.get(name) or grey | {"symbol": "circle" if name == BASE else "square"} for name in names}


def page(summary: Summary, study: str) -> str:
    """The HTML page of a study's numbers and its YAML."""
    names, cells = names_of(summary), summary["cells"]
    numbers = {
        "names": names,
        "looks": looks(names),
        "costs": COSTS,
        "units": UNITS,
        "always": ALWAYS,
        "axes": summary["axes"],
        "cells": [cell | {"texts": _texts(cell)} for cell in cells],
    }
    return document(
        summary["title"],
        f"{_lead(summary)}{_shorts(cells)}{_controls(cells, names)}",
        [
            _results(cells), _axes(summary), _costs(), _curves(cells), _forgetting(cells), _pairs(cells),
            _words(summary), _measured(summary, study),
        ],
        numbers,
        "page.js",
    )  # fmt: skip


def _lead(summary: Summary) -> str:
    works = [cell["works"] for cell in summary["cells"]]
    bases, data = (list(dict.fromkeys(work[name] for work in works)) for name in ("base", "data"))
    count = len(summary["seeds"])
    told = f"{_list(bases)} on {_list(data)}; {count} run{'s' if count > 1 else ''} of each"
    if summary["budget"]:
        told += f"; made equal by {summary['budget']}"
    paper = f'<p class="soft">After {safe(summary["paper"])}.</p>' if summary["paper"] else ""
    return f'<p class="soft">{safe(told)}.</p>{paper}'


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _of(index: int) -> str:
    """Belongs to one cell: hidden when another is chosen; without scripts all are there."""
    return f'data-cell="{index}"'


def _shorts(cells: list[Summary]) -> str:
    made = []
    for index, cell in enumerate(cells):
        items = "".join(f"<li>{safe(text)}</li>" for text in sentences(cell))
        named = f'<h2 class="hint">{safe(cell["name"])}</h2>' if cell["name"] else ""
        made.append(f'<section {_of(index)} aria-label="In short">{named}<ul class="short">{items}</ul></section>')
    return "".join(made)


def _controls(cells: list[Summary], names: list[str]) -> str:
    chosen = ""
    if len(cells) > 1:
        options = "".join(f'<option value="{i}">{safe(cell["name"])}</option>' for i, cell in enumerate(cells))
        chosen = f'<div><label for="work">Show</label> <select id="work">{options}</select></div>'
    chips = "".join(
        f'<label><input type="checkbox" name="method" value="{safe(name)}" checked>'
        f'<svg width="12" height="12" aria-hidden="true" fill="{look["hex"]}">{DRAWN[look["symbol"]]}</svg>'
        f"{safe(name)}</label>"
        for name, look in looks(names).items()
    )
    return (
        f'<form class="controls" aria-label="What is shown" onsubmit="return false">{chosen}'
        f'<fieldset><legend>Methods {BUTTONS}</legend><div class="chips">{chips}</div></fieldset></form>'
    )


# The table


COLUMNS = ("wins", *COSTS, "lr", "runs")
HEADS = {"wins": "beats others", **COSTS, "lr": "learning rate", "runs": "runs"}


def _results(cells: list[Summary]) -> str:
    tables = "".join(_table(cell, index) for index, cell in enumerate(cells))
    return f'<section id="results"><h2>Results</h2>{tables}</section>'


def _table(cell: Summary, index: int) -> str:
    metric = cell["metric"]
    heads = ["method", f"{metric} [95 % interval]", *(HEADS[name] for name in COLUMNS)]
    finished = [one["mean"] for one in cell["methods"] if one["mean"] is not None]
    low, high = (min(finished), max(finished)) if finished else (0.0, 1.0)
    rows = "".join(_row(one, cell, low, high) for one in cell["methods"])
    named = f"{cell['name']}: " if cell["name"] else ""
    work = cell["works"]
    caption = (
        f"{named}{metric} ({direction(cell)}) of {work['base']} on {work['data']}, mean over the runs with its "
        "bootstrap interval; “beats others” is the share of paired runs, same seed and data order, in which a method "
        "did better than another. The heads of the columns sort."
    )
    # Rows come with the best first.
    table = sortable(caption, heads, rows, 1, descending=not cell["lower"])
    return framed(f"Table of results {cell['name']}", table, _of(index))


def _row(one: Summary, cell: Summary, low: float, high: float) -> str:
    kind = "baseline" if one["kind"] != "tune" or one["slug"] == "full" else "method"
    note = f' <small title="{safe(one["note"])}">({safe(one["note"])})</small>' if one["note"] else ""
    head = f'<th scope="row" data-value="{safe(one["name"])}">{safe(one["name"])}{note}</th>'
    named = f'data-method="{safe(one["name"])}"'
    if one["mean"] is None:
        said = safe(one["error"] or "it has no result")
        return f'<tr class="failed" {named}>{head}<td colspan="{len(COLUMNS) + 1}">failed: {said}</td></tr>'
    part = 100 * (one["mean"] - low) / (high - low) if high > low else 100
    part = 100 - part if cell["lower"] else part
    spread = f" <small>{one['low']:.4g} to {one['high']:.4g}</small>" if one["runs"] > 1 else ""
    figure = (
        f'<td class="figure" style="--part:{part:.0f}%" data-value="{one["mean"]!r}">{one["mean"]:.4g}{spread}</td>'
    )
    trained = one["kind"] == "tune"
    told = {
        "wins": "-" if one["wins"] is None else f"{100 * one['wins']:.0f} %",
        **{name: cost_text(one, name) if one[name] is not None else "-" for name in COSTS},
        "lr": f"{one['lr']:.2g}" if trained and one["lr"] else "-",
        "runs": f"{one['runs']}" + (f", {one['failed']} failed" if one["failed"] else ""),
    }
    if one["share"] and trained:
        told["trainable"] += f" <small>{100 * one['share']:.3g} %</small>"
    others = "".join(
        f'<td data-value="{"" if one[name] is None else repr(one[name])}">{told[name]}</td>' for name in COLUMNS
    )
    return f'<tr class="{kind}" {named}>{head}{figure}{others}</tr>'


# Pictures


def _costs() -> str:
    drawn = "".join(
        figure(f"cost-{cost}", f"Against {name}", "The line joins what no other method beats in both.")
        for cost, name in COSTS.items()
    )
    told = (
        "Further left is cheaper; bars are 95 % intervals, dotted lines what trains nothing. "
        "The values are in the table of results."
    )
    return f'<section><h2>What it costs</h2><p class="soft">{told}</p><div class="pictures">{drawn}</div></section>'


def _curves(cells: list[Summary]) -> str:
    drawn = figure("training", "Training loss", "Mean over the runs; the band is from the least to the greatest.")
    if any(one["held_out"] for cell in cells for one in cell["methods"]):
        drawn += figure("held-out", "Held out", "The deciding figure on held-out rows while training goes on.")
    tables = "".join(_curve_table(cell, index) for index, cell in enumerate(cells))
    return f'<section><h2>How it learns</h2><div class="pictures">{drawn}</div>{tables}</section>'


def _curve_table(cell: Summary, index: int) -> str:
    known = [one for one in cell["methods"] if one["curve"]]
    rows = "".join(
        f'<tr data-method="{safe(one["name"])}"><th scope="row">{safe(one["name"])}</th>'
        + "".join(f"<td>{value:.4g}</td>" for value in _picked(one["curve"]))
        + "</tr>"
        for one in known
    )
    table = plain_table("Training loss, smoothed", ["method", "first", "a quarter", "half", "last"], rows)
    shown = framed("Table of training losses", table)
    return f"<details {_of(index)}><summary>Training loss as a table</summary>{shown}</details>"


def _picked(curve: Summary) -> list[float]:
    """The loss at the beginning, after a quarter, after half, at the end."""
    values = curve["mean"]
    return [values[round(part * (len(values) - 1))] for part in (0, 0.25, 0.5, 1)]


def _forgetting(cells: list[Summary]) -> str:
    if not any(one["forgetting"] for cell in cells for one in cell["methods"]):
        return ""
    caption = "From the ring (before) to the dot (after); further right is more forgotten."
    drawn = figure("forgetting", "Loss on the base's own domain", caption, wide=True)
    tables = "".join(_forgotten(cell, index) for index, cell in enumerate(cells))
    shown = f'<div class="pictures">{drawn}</div>{tables}'
    return f'<section id="forgetting-section"><h2>What it forgets</h2>{shown}</section>'


def _forgotten(cell: Summary, index: int) -> str:
    known = [one for one in cell["methods"] if one["forgetting"] and one["kind"] == "tune"]
    rows = "".join(
        f'<tr data-method="{safe(one["name"])}"><th scope="row">{safe(one["name"])}</th>'
        f"<td>{one['forgetting']['before']:.4g}</td><td>{one['forgetting']['after']:.4g}</td>"
        f"<td>{one['forgetting']['after'] - one['forgetting']['before']:+.3g}</td></tr>"
        for one in known
    )
    table = plain_table("Loss on held-out text of the base’s own domain", ["method", "before", "after", "change"], rows)
    shown = framed("Table of forgetting", table)
    return f"<details {_of(index)}><summary>Forgetting as a table</summary>{shown}</details>"


def _axes(summary: Summary) -> str:
    if not summary["axes"]:
        return ""
    drawn = "".join(
        figure(f"axis-{number}", f"By {axis}", f"The rest as chosen above; {len(values)} values.", wide=True)
        for number, (axis, values) in enumerate(summary["axes"].items())
    )
    tables = "".join(_along(summary, axis) for axis in summary["axes"])
    return f'<section><h2>What else matters</h2><div class="pictures">{drawn}</div>{tables}</section>'


def _along(summary: Summary, axis: str) -> str:
    """All values of the pictures over an axis: methods down, pieces of work across."""
    rows = ""
    for name in names_of(summary):
        found = ((next((one for one in cell["methods"] if one["name"] == name), None)) for cell in summary["cells"])
        shown = "".join(f"<td>{interval(one) if one else '-'}</td>" for one in found)
        rows += f'<tr data-method="{safe(name)}"><th scope="row">{safe(name)}</th>{shown}</tr>'
    heads = ["method", *(cell["name"] for cell in summary["cells"])]
    shown = framed(f"Table by {axis}", plain_table("Mean and interval on every piece of work", heads, rows))
    return f"<details><summary>By {safe(axis)}, as a table</summary>{shown}</details>"


def _pairs(cells: list[Summary]) -> str:
    tables = "".join(_matrix(cell, index) for index, cell in enumerate(cells))
    return f"<section><h2>Who beats whom</h2>{tables}</section>"


def _matrix(cell: Summary, index: int) -> str:
    names = [one["name"] for one in cell["methods"] if one["name"] in cell["pairs"]]
    rows = ""
    for one in names:
        shown = ""
        for other in names:
            rate = cell["pairs"][one].get(other)
            if rate is None:
                shown += '<td class="soft">·</td>'
            else:
                shown += f'<td style="background:rgba(var(--good),{0.55 * rate:.2f})">{100 * rate:.0f} %</td>'
        rows += f'<tr data-method="{safe(one)}"><th scope="row">{safe(one)}</th>{shown}</tr>'
    caption = "Share of paired runs in which the method of the row did better than that of the column."
    table = plain_table(caption, ["method", *names], rows).replace("<table>", '<table class="matrix">', 1)
    return framed("Table of win rates", table, _of(index))


def _texts(cell: Summary) -> Summary:
    """What each picture shows, in words."""
    metric, texts = cell["metric"], {}
    by_name = {one["name"]: one for one in cell["methods"]}
    for cost, name in COSTS.items():
        front = [
            f"{one} ({cost_text(by_name[one], cost)}, {metric} {by_name[one]['mean']:.4g})"
            for one in cell["fronts"][cost]
        ]
        texts[cost] = f"{metric} against {name}. Not beaten in both: {'; '.join(front) or 'none'}."
    for part, what in (("curve", "training loss"), ("held_out", f"held-out {metric}")):
        known = [
            f"{one['name']} from {one[part]['mean'][0]:.4g} to {one[part]['mean'][-1]:.4g}"
            for one in cell["methods"]
            if one[part]
        ]
        texts[part] = f"{what} over the steps: {'; '.join(known) or 'nothing was recorded'}."
    lost = [
        f"{one['name']} {one['forgetting']['before']:.4g} to {one['forgetting']['after']:.4g}"
        for one in cell["methods"]
        if one["forgetting"] and one["kind"] == "tune"
    ]
    texts["forgetting"] = f"Loss on the base's own domain, before to after: {'; '.join(lost) or 'not measured'}."
    return texts


def _words(summary: Summary) -> str:
    if not summary["expected"] and not summary["found"]:
        return ""
    parts = [("What the paper found", summary["expected"]), ("What we found, on our scale", summary["found"])]
    shown = "".join(f'<h3>{head}</h3><p class="quote">{safe(text.strip())}</p>' for head, text in parts if text)
    return f"<section><h2>Beside the paper</h2>{shown}</section>"


def _measured(summary: Summary, study: str) -> str:
    rates = summary["rates"]
    tuned = "Each method ran with the learning rate that the study gives or the method’s own."
    if rates:
        count = len(rates) if isinstance(rates, list) else rates
        tuned = (
            f"Each method’s learning rate was chosen in {count} short runs, as many for each, on one half of the "
            "held-out rows; everything here is of the other half."
        )
    told = (
        f"{tuned} Runs of the same seed see the same rows in the same order. Intervals are percentile bootstraps of "
        "the mean over seeds: they say how far another set of seeds might lead, not another set of data. Step time is "
        "the median over a run’s steps; other work on the machine makes it longer. FLOPs are those of matrix "
        "products, convolutions and attention in one step, forward and backward."
    )
    return (
        f"<section><h2>How it was measured</h2><p>{safe(told)}</p><details><summary>The study’s YAML</summary>"
        f'<pre {PART} aria-label="The study\'s YAML">{safe(study)}</pre></details></section>'
    )


# Markdown


def markdown(summary: Summary, drawn: list[Path]) -> str:
    """The study as Markdown, with links to its pictures."""
    lines = [f"# {summary['title']}", ""]
    if summary["paper"]:
        lines += [f"After {summary['paper']}.", ""]
    ours = [path for path in drawn if not path.stem.startswith("by-")]
    for number, cell in enumerate(summary["cells"]):
        if cell["name"]:
            lines += [f"## {cell['name']}", ""]
        lines += [*(f"- {text}" for text in sentences(cell)), ""]
        heads = ["method", f"{cell['metric']} [95 %]", *(HEADS[name] for name in COLUMNS)]
        lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for one in cell["methods"]:
            if one["mean"] is None:
                lines.append(f"| {one['name']} | failed: {cell_of(one['error'])} |" + " |" * (len(heads) - 2))
                continue
            shown = [
                one["name"] + (f" ({one['note']})" if one["note"] else ""),
                interval(one),
                "-" if one["wins"] is None else f"{100 * one['wins']:.0f} %",
                *(cost_text(one, cost) for cost in COSTS),
                f"{one['lr']:.2g}" if one["kind"] == "tune" and one["lr"] else "-",
                f"{one['runs']}" + (f", {one['failed']} failed" if one["failed"] else ""),
            ]
            lines.append(f"| {' | '.join(map(cell_of, shown))} |")
        lines.append("")
        lines += [f"![{path.stem}]({path.as_posix()})\n" for path in ours if path.stem.endswith(f"-{number + 1}")]
    lines += [f"![{path.stem}]({path.as_posix()})\n" for path in drawn if path.stem.startswith("by-")]
    for head, text in (
        ("What the paper found", summary["expected"]),
        ("What we found, on our scale", summary["found"]),
    ):
        if text:
            lines += [f"## {head}", "", text.strip(), ""]
    return "\n".join(lines)


__all__ = ["looks", "markdown", "names_of", "page", "save", "short"]
