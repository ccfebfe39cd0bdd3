"""The report of a run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Curve = Sequence[tuple[float, float]]
COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2", "#64748b", "#be185d")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 260, 64, 12, 12, 34
ROWS_SHOWN, COLUMNS_SHOWN = 64, 120

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 820px; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.lead { opacity: .75; margin-top: .3rem; } svg { width: 100%; height: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.25rem; } .tile span { font-size: .8rem; opacity: .75; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.wide { font-size: .75rem; } table.wide th[scope=row] { font-weight: normal; overflow-wrap: anywhere; }
caption { text-align: left; opacity: .75; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); border-radius: 6px; padding: .5rem .7rem;
  margin: .2rem 0 .7rem; font: 13px/1.45 ui-monospace, monospace; }
.label { font-size: .8rem; opacity: .75; } details { margin-top: 1rem; }
"""


def page(metrics: Mapping[str, Any], recipe: str) -> str:
    """The report of `metrics.json`'s content and the recipe's text."""
    run = metrics["recipe"]
    title = f"{run['method']} on {run['base']}"
    parts = [
        f"<h1>{_safe(title)}</h1>",
        f'<p class="lead">{_safe(metrics["task"])} from {_safe(run["data"])}, {metrics["steps"]:,} steps</p>',
        _tiles(metrics),
        "<h2>Loss</h2>",
        _losses(metrics),
        _figures(metrics),
        *_histories(metrics.get("history", {})),
        _samples(metrics.get("samples", {})),
        _adapter(metrics["adapter"]),
        f"<details><summary>Recipe</summary><pre>{_safe(recipe)}</pre></details>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_safe(title)}</title>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n'


def _safe(text: Any) -> str:
    return html.escape(str(text))


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _cell(number: str) -> str:
    return f'<td class="number">{number}</td>'


def _tiles(metrics: Mapping[str, Any]) -> str:
    adapter, speed = metrics["adapter"], metrics["throughput"]
    tiles = [
        (f"{adapter['trainable']:,}", f"trained values, {100 * adapter['share']:.3g} % of the base"),
        (size(metrics["peak_memory_bytes"]), f"peak memory on {metrics['device']}"),
        (f"{speed['steps_per_second']:.3g}", "steps per second"),
    ]
    if metrics.get("before") and metrics.get("after"):
        change = f"{metrics['before']['loss']:.4g} → {metrics['after']['loss']:.4g}"
        tiles.insert(0, (change, "held-out loss, before and after"))
    if speed.get("tokens_per_second"):
        tiles.append((f"{speed['tokens_per_second']:,.0f}", "tokens per second"))
    cells = "".join(f'<div class="tile"><b>{_safe(b)}</b><span>{_safe(s)}</span></div>' for b, s in tiles)
    return f'<div class="tiles">{cells}</div>'


def _losses(metrics: Mapping[str, Any]) -> str:
    curves: dict[str, Curve] = {"training": metrics["losses"]}
    held = [(0, metrics["before"]["loss"])] if metrics.get("before") else []
    held += [(step, figures["loss"]) for step, figures in metrics.get("evaluations", [])]
    if metrics.get("after"):
        held.append((metrics["steps"], metrics["after"]["loss"]))
    if held:
        curves["held out"] = held
    return lines(curves, "step", "loss")


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def lines(curves: Mapping[str, Curve], across: str, up: str) -> str:
    """Curves as an SVG picture; what is not finite is left out."""
    kept = {
        name: [(float(x), float(y)) for x, y in curve if math.isfinite(x) and math.isfinite(y)]
        for name, curve in curves.items()
    }
    points = [point for curve in kept.values() for point in curve]
    if not points:
        return "<p>Nothing was recorded.</p>"
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    x1, margin = (x1 if x1 > x0 else x0 + 1), 0.05 * (y1 - y0) or abs(y0) * 0.1 or 1.0
    y0, y1 = y0 - margin, y1 + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    marks = []
    for tick in _ticks(y0, y1):
        _, y = place(x0, tick)
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(x0, x1):
        x, _ = place(tick, y0)
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    marks.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{_safe(across)}</text>')
    for index, (name, curve) in enumerate(kept.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(curve) <= 40:
            dots = (place(x, y) for x, y in curve)
            marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in dots]
        if len(kept) <= len(COLOURS):
            marks.append(
                f'<text x="{WIDTH - RIGHT - 4}" y="{TOP + 12 + 16 * index}" text-anchor="end" '
                f'style="fill:{colour}">{_safe(name)}</text>'
            )
    title = f"<title>{_safe(up)} by {_safe(across)}</title>"
    return _svg(HEIGHT, title + "".join(marks))


def _svg(height: float, content: str) -> str:
    style = 'font-size="11" font-family="system-ui, sans-serif" fill="currentColor" role="img"'
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" xmlns="http://www.w3.org/2000/svg" {style}>{content}</svg>'


def _histories(history: Mapping[str, Sequence[tuple[int, Any]]]) -> Iterable[str]:
    """What rules recorded: numbers as curves, a number for each of many places, or some chosen ones, as a raster."""
    for name, entries in history.items():
        if not entries:
            continue
        values = [value for _, value in entries]
        yield f"<h2>{_safe(name)}</h2>"
        if all(_is_number(value) for value in values):
            yield lines({name: entries}, "step", name)
        elif all(isinstance(value, Mapping) and all(map(_is_number, value.values())) for value in values):
            yield raster([(step, dict(value)) for step, value in entries], name)
        elif all(isinstance(value, (list, tuple)) for value in values):
            yield raster([(step, {str(item): 1.0 for item in value}) for step, value in entries], name)
        else:
            shown = "".join(f"<tr><td>{step}</td><td>{_safe(value)}</td></tr>" for step, value in entries[-ROWS_SHOWN:])
            yield f"<table><tr><th>step</th><th>value</th></tr>{shown}</table>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _natural(text: str) -> list[tuple[int, Any]]:
    """A sorting key by which block 10 comes after block 9."""
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in text.replace(".", " ").split()]


def _spread(number: int, most: int) -> list[int]:
    """Indices of at most so many of a number of things, evenly spread, the first and the last among them."""
    if number <= most:
        return list(range(number))
    return sorted({round(index * (number - 1) / (most - 1)) for index in range(most)})


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names without the dotted pieces that all begin and all end with."""
    pieces = [name.split(".") for name in names]
    shortest, first, last = min(len(piece) for piece in pieces) - 1, 0, 0
    if len(names) > 1:
        while first < shortest and len({piece[first] for piece in pieces}) == 1:
            first += 1
        while last < shortest - first and len({piece[-1 - last] for piece in pieces}) == 1:
            last += 1
    return {name: ".".join(piece[first : len(piece) - last])[-48:] for name, piece in zip(names, pieces, strict=True)}


def _shade(value: float, low: float, top: float) -> str:
    share = min(max((abs(value) - low) / (top - low), 0), 1)
    return f'fill="{COLOURS[0]}" fill-opacity="{0.06 + 0.94 * share:.3f}"'


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """The numbers of the lightest and of the darkest shade: from 0, unless all lie close together far above it."""
    sizes = [abs(value) for value in values]
    low, top = min(sizes, default=0), max(sizes, default=0) or 1
    return (low, top) if low > top / 2 and top > low else (0, top)


def _legend(values: Sequence[float], low: float, top: float, left: float) -> list[str]:
    """Swatches of what the shades mean: every number that can occur where they are few whole ones, else some."""
    whole = all(value == int(value) >= 0 for value in values) and top <= 12
    steps = [float(n) for n in range(int(low), int(top) + 1)] if whole else sorted({low, *_ticks(low, top), top})
    marks, x = [], left
    for step in steps:
        label = f"{step:.4g}"
        marks.append(f'<rect x="{x:.1f}" y="2" width="14" height="14" stroke="#8888" {_shade(step, low, top)}/>')
        marks.append(f'<text x="{x + 18:.1f}" y="13">{label}</text>')
        x += 26 + 7 * len(label)
    return marks


def _spells(
    entries: Sequence[tuple[int, Mapping[str, float]]], place: str, end: int
) -> Iterable[tuple[int, int, int, float]]:
    """How long a place had which number: first step, last step that says so, step at which it ends, the number."""
    spell: tuple[int, int, int, float] | None = None
    for (step, values), until in zip(entries, [*(step for step, _ in entries[1:]), end], strict=True):
        value = values.get(place)
        if spell is not None and spell[3] == value:
            spell = spell[0], step, until, spell[3]
            continue
        if spell is not None:
            yield spell
        spell = None if value is None else (step, step, until, value)
    if spell is not None:
        yield spell


def raster(entries: Sequence[tuple[int, Mapping[str, float]]], name: str = "values") -> str:
    """A number for each place over time: rows are places, the axis is the step, darkness the number; and as a table."""
    entries = [entries[index] for index in _spread(len(entries), COLUMNS_SHOWN)]
    rows = sorted({place for _, values in entries for place in values}, key=_natural)
    left_out, rows = len(rows) - ROWS_SHOWN, rows[:ROWS_SHOWN]
    if not rows:
        return "<p>Nothing was recorded.</p>"
    numbers = [values[place] for _, values in entries for place in rows if place in values]
    (low, top), short = _scale(numbers), _short(rows)
    label, tall, above = min(300, 12 + 6 * max(map(len, short.values()))), 16, 26
    steps = [step for step, _ in entries]
    # A number holds until the next one; the last as long as one does on average.
    end = steps[-1] + max(1, round((steps[-1] - steps[0]) / max(1, len(steps) - 1)))
    wide = (WIDTH - RIGHT - label) / (end - steps[0])
    marks = _legend(numbers, low, top, label)
    for index, place in enumerate(rows):
        y = above + index * tall
        marks.append(f'<text x="{label - 6}" y="{y + 12}" text-anchor="end">{_safe(short[place])}</text>')
        for step, last, until, value in _spells(entries, place, end):
            when = f"step {step}" if step == last else f"steps {step} to {last}"
            marks.append(
                f'<rect x="{label + (step - steps[0]) * wide:.1f}" y="{y + 1}" '
                f'width="{max((until - step) * wide - 0.3, 0.5):.2f}" height="{tall - 2}" {_shade(value, low, top)}>'
                f"<title>{_safe(place)}, {when}: {value:g}</title></rect>"
            )
    height = above + len(rows) * tall + 18
    for tick in {steps[0], *_ticks(steps[0], end - (end - steps[0]) / 12)}:
        marks.append(f'<text x="{label + (tick - steps[0]) * wide:.1f}" y="{height - 4}">{tick:g}</text>')
    marks.append(f'<text x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">step</text>')
    more = f"<p class='label'>{left_out} more places are not shown.</p>" if left_out > 0 else ""
    return (
        _svg(height, f"<title>{_safe(name)} by place and step</title>" + "".join(marks))
        + _table(rows, [entries[index] for index in _spread(len(entries), 10)], name)
        + more
    )


def _table(rows: Sequence[str], entries: Sequence[tuple[int, Mapping[str, float]]], name: str) -> str:
    """A raster's numbers at a few steps, for those who cannot see it."""
    head = "".join(f'<th scope="col">{step}</th>' for step, _ in entries)
    body = "".join(
        f'<tr><th scope="row">{_safe(place)}</th>'
        + "".join(_cell(f"{values[place]:.4g}" if place in values else "") for _, values in entries)
        + "</tr>"
        for place in rows
    )
    caption = f"<caption>{_safe(name)} at some steps</caption>"
    table = f'<table class="wide">{caption}<tr><th scope="col">place</th>{head}</tr>{body}</table>'
    return f"<details><summary>As a table</summary>{table}</details>"


def _figures(metrics: Mapping[str, Any]) -> str:
    before, after = metrics.get("before"), metrics.get("after")
    if not before or not after:
        return "<p>Nothing was held out, so there is no held-out loss.</p>"
    rows = "".join(
        f"<tr><td>{_safe(name)}</td>{_cell(f'{before[name]:.5g}')}{_cell(f'{value:.5g}')}</tr>"
        for name, value in after.items()
    )
    return f"<h2>Held-out figures</h2><table><tr><th></th><th>before</th><th>after</th></tr>{rows}</table>"


def _samples(samples: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    before, after = samples.get("before", []), samples.get("after", [])
    if not after:
        return ""
    shown = ["<h2>Samples</h2>"]
    for index, sample in enumerate(after):
        texts = [("prompt", sample["prompt"]), ("reference", sample["reference"])]
        if index < len(before):
            texts.append(("before", before[index]["generated"]))
        texts.append(("after", sample["generated"]))
        shown += [f'<div class="label">{label}</div><pre>{_safe(text)}</pre>' for label, text in texts]
        shown.append("<hr>" if index + 1 < len(after) else "")
    return "".join(shown)


def _adapter(adapter: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_safe(row['site'])}</td><td>{_safe(row['part'])}</td>{_cell(format(row['trainable'], ','))}</tr>"
        for row in adapter["sites"][:ROWS_SHOWN]
    )
    more = len(adapter["sites"]) - ROWS_SHOWN
    rows += f'<tr><td colspan="3">and {more} more</td></tr>' if more > 0 else ""
    summary = f"Adapter: {len(adapter['sites'])} sites, {size(adapter['stored_bytes'])} stored"
    head = "<tr><th>site</th><th>part</th><th>trained values</th></tr>"
    return f"<details><summary>{_safe(summary)}</summary><table>{head}{rows}</table></details>"
