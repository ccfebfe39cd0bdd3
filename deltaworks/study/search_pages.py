"""The pages of a search: one HTML file that needs nothing beside it, Markdown, and pictures for papers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .fairness import ENDS, GAP, OF, WORST, less_is_better
from .page_parts import COLOURS, document, figure, framed, lines, safe, sortable, table
from .pareto import Best, Found, described
from .search_spec import COSTS
from .statistics import bootstrap
from .summary import UNITS, short

SPENT = {"params": "values in the artifact", "bytes": "stored bytes", "memory": "peak memory", "time": "step time"}
ORIGINS = {"chance": "drawn by chance", "model": "proposed by the model", "transfer": "from another search"}
STATES = ("done", "pruned", "failed")
PAGE, REPORT = "report.html", "report.md"

Told = dict[str, Any]


def save(found: Found, folder: str | Path) -> Path:
    """Write `report.html`, `report.md` and `pictures/` beside what `search` wrote.

    Returns:
        The HTML page's path.

    Raises:
        ImportError: when plotly or matplotlib is missing; the message says how to install them.
    """
    from .search_pictures import pictures

    folder, told = Path(folder), tell(found)
    (folder / PAGE).write_text(page(told), encoding="utf-8")
    drawn = pictures(told, folder / "pictures")
    (folder / REPORT).write_text(markdown(told, [path.relative_to(folder) for path in drawn]), encoding="utf-8")
    return folder / PAGE


# Numbers


def tell(found: Found) -> Told:
    """A search as plain values: what its pages show.

    Keys: `title`, `base`, `data`, `metric`, `lower`, `cost` (None without one) and its `unit`, `trials`, `best`,
    `choices`, `importance`, `groups` (None where it was not searched for fairness), `agreement`, `winner`, `most`.
    """
    search, cost = found.search, found.search.cost
    recipe = search.recipe({})
    best = [_best(number, one, found) for number, one in enumerate(found.best, 1)]
    return {
        "title": search.title or "What to tune",
        "base": recipe.base,
        "data": recipe.data,
        "metric": found.metric,
        "lower": found.lower,
        "cost": None if cost == "none" else SPENT[cost],
        "unit": UNITS.get(COSTS.get(cost, ""), ""),
        "fidelity": search.fidelity,
        "full": search.full,
        "trials": [
            {"number": one["number"], "status": one["status"], "value": one["value"], "cost": one["cost"],
             "origin": one["origin"], "error": one["error"], "text": described(one["decided"])}
            for one in found.trials
        ],
        "best": best,
        "choices": _choices(found),
        "importance": [
            {"name": _called(name), "share": share}
            for name, share in sorted(found.importance.items(), key=lambda item: -item[1])
        ],
        "groups": _groups(found) if search.fair else None,
        "agreement": found.agreement,
        "winner": 1 + found.best.index(found.winner),
    }  # fmt: skip


def _best(number: int, one: Best, found: Found) -> Told:
    figures = [(row.get("figures") or {}).get(found.metric) for row in one.full]
    values = [value for value in figures if value is not None]
    full = bootstrap(values) if values else None
    return {
        "name": f"{number:02d}",
        "file": "" if one.path is None else one.path.name,
        "trial": one.number,
        "text": described(one.decided),
        "value": one.value,
        "cost": one.cost,
        "trainable": one.trainable,
        "full": None if full is None else {"mean": full.mean, "low": full.low, "high": full.high, "runs": full.count},
        "failed": next((row["error"] for row in one.full if row.get("error")), None),
    }


def _called(name: str) -> str:
    """A choice as a person calls it: `size.lora` is the size of lora, `layer.3` is block 3."""
    kind, _, rest = name.partition(".")
    if kind == "piece":
        block, _, piece = rest.partition(".")
        return f"{piece} of block {block}"
    return {"size": rest, "layer": f"block {rest}"}.get(kind, "learning rate")


def _shown(name: str, value: Any, found: Found) -> str:
    """A choice's value as a person reads it."""
    kind, _, rest = name.partition(".")
    if kind == "rate":
        return f"{value:.2g}"
    if kind != "size":
        return "yes" if value else "no"
    sizes = next(one["sizes"] for one in found.space["choices"] if one["slug"] == rest)
    return " ".join(f"{key} {size}" for key, size in sizes[value - 1].items()) or "yes" if value else "no"


def _choices(found: Found) -> list[Told]:
    """What the best consist of: for each choice its value in each of them, and how often it was made in all trials."""
    made = []
    for name in found.best[0].configuration:
        tried = [one["configuration"].get(name) for one in found.trials]
        share = None if name == "rate" else sum(bool(value) for value in tried) / len(tried)
        values = [_shown(name, one.configuration[name], found) for one in found.best]
        made.append({"name": _called(name), "values": values, "tried": share})
    return made


def _groups(found: Found) -> Told:
    """Every group's figure in every one of the best, in its full runs where there are some, with its interval.

    The figure is the one that the search's metric is over; of several full runs means are taken, of the intervals' ends
    as well.
    """
    figure = found.metric
    for start in (WORST, GAP):
        figure = figure.removeprefix(start)
    if figure.startswith(OF):
        figure = figure.rpartition(".")[2]
    by_trial = {one["number"]: one for one in found.trials}
    shown, names = [], {}
    for number, one in enumerate(found.best, 1):
        runs = [row["figures"] for row in one.full if row.get("figures")] or [by_trial[one.number]["groups"]]
        # A difference of rates is of no figure of a group; the accuracy says most.
        figure = figure if any(name.startswith(OF) and name.endswith(f".{figure}") for name in runs[0]) else "accuracy"
        groups = [name[len(OF) : -len(".rows")] for name in runs[0] if name.startswith(OF) and name.endswith(".rows")]
        for group in sorted(groups):
            key = f"{OF}{group}.{figure}"
            names[group] = int(runs[0][f"{OF}{group}.rows"])
            low, high = (_mean(runs, key + end) for end in ENDS)
            shown.append({
                "best": f"{number:02d}", "group": group, "rows": names[group], "value": _mean(runs, key), "low": low,
                "high": high,
            })  # fmt: skip
        shown.append({
            "best": f"{number:02d}", "group": None, "value": _mean(runs, found.metric),
            "low": _mean(runs, found.metric + ENDS[0]), "high": _mean(runs, found.metric + ENDS[1]),
        })  # fmt: skip
    return {"column": found.search.fair, "figure": figure, "names": names, "shown": shown,
            "lower": less_is_better(figure), "full": any(one.full for one in found.best)}  # fmt: skip


def _mean(runs: list[Mapping[str, float]], name: str) -> float | None:
    known = [run[name] for run in runs if run.get(name) is not None]
    return sum(known) / len(known) if known else None


# Words


def sentences(told: Told) -> list[str]:
    """What came out, in words."""
    metric, best = told["metric"], told["best"]
    states = [one["status"] for one in told["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    first, cheap = best[told["winner"] - 1], best[0]
    said = [f"Best {metric}: {first['text']}, {_figure(first)}{_at(first, told)} (recipe {first['name']})."]
    if cheap is not first:
        said.append(f"Cheapest that none beats: {cheap['text']}, {_figure(cheap)}{_at(cheap, told)}.")
    said.append(f"{len(told['trials'])} configurations were tried: {counts}; {len(best)} of them none beats.")
    if told["importance"]:
        most = told["importance"][:3]
        shares = ", ".join(f"{one['name']} {100 * one['share']:.0f} %" for one in most)
        said.append(f"What matters most: {shares}.")
    if told["agreement"] is not None:
        said.append(
            f"Short trials and full runs put the best in an order with a rank correlation of {told['agreement']:.2f}."
        )
    if told["groups"]:
        groups = [one for one in told["groups"]["shown"] if one["best"] == first["name"] and one["group"] is not None]
        known = [one for one in groups if one["value"] is not None]
        if known:
            worst = (max if told["groups"]["lower"] else min)(known, key=lambda one: one["value"])
            said.append(f"Worst group of recipe {first['name']}: {worst['group']}, {_interval(worst)}.")
    return said


def _figure(one: Told) -> str:
    return f"{_whole(one)} at full length" if one["full"] else f"{one['value']:.4g} in its trial"


def _whole(one: Told) -> str:
    """The figure of full runs."""
    full = one["full"]
    if full is None:
        return "failed" if one["failed"] else "-"
    return f"{full['mean']:.4g}" + (f" ({full['low']:.4g} to {full['high']:.4g})" if full["runs"] > 1 else "")


def _at(one: Told, told: Told) -> str:
    return "" if told["cost"] is None else f" at {short(one['cost'], told['unit'])} {told['cost']}"


def _interval(one: Told) -> str:
    if one["value"] is None:
        return "-"
    spread = "" if one["low"] is None else f" ({one['low']:.4g} to {one['high']:.4g})"
    return f"{one['value']:.4g}{spread}"


def _how(told: Told) -> str:
    """How it was found, in words."""
    full = (
        f"What none beats ran at full length, {told['full']} time{'s' if told['full'] > 1 else ''} each, judged by the "
        "other half, which nothing was chosen by."
        if told["full"]
        else "Nothing ran at full length."
    )
    return (
        f"Trials are runs of {100 * told['fidelity']:.0f} % of the length, judged by one half of the held-out rows. "
        f"{full} Intervals of full runs are bootstraps over their seeds, those of groups over the held-out rows. The "
        "importance of a choice is the share of the variance, among trials in the best quarter, that it explains "
        "(PED-ANOVA); with few trials it is rough."
    )


# HTML


def page(told: Told) -> str:
    """The HTML page.

    Raises:
        ImportError: when plotly is missing.
    """
    items = "".join(f"<li>{safe(text)}</li>" for text in sentences(told))
    about = f'<p class="soft">{safe(told["base"])} on {safe(told["data"])}.</p>'
    short_ = f'<section aria-label="In short"><ul class="short">{items}</ul></section>'
    numbers = told | {"colours": COLOURS, "origins": ORIGINS}
    parts = [_front(told), _consists(told), _matters(told), _fair(told), _all(told)]
    measured = f"<section><h2>How it was found</h2><p>{safe(_how(told))}</p></section>"
    return document(told["title"], about + short_, [*parts, measured], numbers, "search.js")


def _front(told: Told) -> str:
    metric, cost = told["metric"], told["cost"]
    heads = ["recipe", "configuration", f"{metric}, trial", f"{metric}, full run", *([cost] if cost else []), "trained"]
    rows = "".join(
        f'<tr><th scope="row" data-value="{one["name"]}">{safe(one["file"] or one["name"])}</th>'
        f'<td class="words" data-value="{safe(one["text"])}">{safe(one["text"])}</td>'
        f'<td data-value="{one["value"]!r}">{one["value"]:.4g}</td>{_full(one)}'
        + (f'<td data-value="{one["cost"]!r}">{short(one["cost"], told["unit"])}</td>' if cost else "")
        + f'<td data-value="{one["trainable"]}">{one["trainable"]:,}</td></tr>'
        for one in told["best"]
    )
    way = "less is better" if told["lower"] else "more is better"
    first = ", the cheapest first" if cost else ""
    caption = f"What no other trial beats: {metric} ({way}){first}. The heads of the columns sort."
    by = heads.index(cost) if cost else 2
    framed_ = framed("Table of the best", sortable(caption, heads, rows, by, descending=not cost and not told["lower"]))
    shown = "; ".join(f"{one['name']} {one['text']}, {_figure(one)}{_at(one, told)}" for one in told["best"])
    pictures = figure(
        "order", "As the search went", "Every trial in its order; the line is the best so far.",
        told=f"{metric} of the trials in their order, from {_first_last(told)}.",
    )  # fmt: skip
    if cost:
        drawn = figure(
            "front", f"{metric} against {cost}",
            "The line joins what no other trial beats in both; rings are full runs.",
            told=f"{metric} against {cost} of all finished trials. Not beaten in both: {shown}.",
        )  # fmt: skip
        pictures = drawn + pictures
    return f'<section id="results"><h2>What none beats</h2>{framed_}<div class="pictures">{pictures}</div></section>'


def _full(one: Told) -> str:
    if one["full"] is None:
        return f'<td data-value="">{_whole(one)}</td>'
    full = one["full"]
    spread = f" <small>{full['low']:.4g} to {full['high']:.4g}</small>" if full["runs"] > 1 else ""
    return f'<td data-value="{full["mean"]!r}">{full["mean"]:.4g}{spread}</td>'


def _first_last(told: Told) -> str:
    values = [one["value"] for one in told["trials"] if one["value"] is not None]
    return f"{values[0]:.4g} at first to {(min if told['lower'] else max)(values):.4g} at best"


def _consists(told: Told) -> str:
    rows = ""
    for choice in told["choices"]:
        shown = "".join(
            f"<td{'' if value == 'no' else ' class=made'}>{'·' if value == 'no' else safe(value)}</td>"
            for value in choice["values"]
        )
        share = "-" if choice["tried"] is None else f"{100 * choice['tried']:.0f} %"
        rows += f'<tr><th scope="row">{safe(choice["name"])}</th>{shown}<td>{share}</td></tr>'
    heads = ["choice", *(one["name"] for one in told["best"]), "of all trials"]
    caption = "What each of the best has; a point is what it leaves out. Beside it, how many of all trials had it."
    made = table(caption, heads, rows).replace("<table>", '<table class="matrix">', 1)
    return f"<section><h2>What the best consist of</h2>{framed('Table of choices', made)}</section>"


def _matters(told: Told) -> str:
    if not told["importance"]:
        return ""
    shares = [(one["name"], f"{100 * one['share']:.1f} %") for one in told["importance"]]
    drawn = figure(
        "importance", "Importance of the choices", "Shares of what decides whether a trial is among the best quarter.",
        wide=True, told=f"Importance: {'; '.join(' '.join(one) for one in shares)}.",
    )  # fmt: skip
    rows = "".join(f'<tr><th scope="row">{safe(name)}</th><td>{share}</td></tr>' for name, share in shares)
    made = framed("Table of importance", table("Importance of the choices, together 100 %", ["choice", "share"], rows))
    more = f"<details><summary>Importance as a table</summary>{made}</details>"
    return f'<section><h2>What matters</h2><div class="pictures">{drawn}</div>{more}</section>'


def _fair(told: Told) -> str:
    groups = told["groups"]
    if not groups:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{one["best"]}</th><td>{safe(one["group"] or told["metric"])}</td>'
        f"<td>{one.get('rows', '')}</td><td>{_interval(one)}</td></tr>"
        for one in groups["shown"]
    )
    of = "full runs" if groups["full"] else "trials"
    told_ = "; ".join(
        f"recipe {one['best']}, {one['group']} {_interval(one)}" for one in groups["shown"] if one["group"] is not None
    )
    caption = f"{groups['figure']} by {groups['column']} in {of}, with bootstrap intervals over the held-out rows"
    drawn = figure(
        "groups", f"{groups['figure']} by {groups['column']}",
        f"Of {of}; bars are 95 % intervals over the held-out rows, where the task has classes.",
        wide=True, told=f"{groups['figure']} by group: {told_}.",
    )  # fmt: skip
    made = framed("Table of groups", table(caption, ["recipe", "group", "rows", "figure [95 %]"], rows))
    more = f"<details open><summary>Groups as a table</summary>{made}</details>"
    return f'<section><h2>How fair they are</h2><div class="pictures">{drawn}</div>{more}</section>'


def _all(told: Told) -> str:
    cost = told["cost"]
    rows = ""
    for one in told["trials"]:
        value = f"{one['value']:.4g}" if one["value"] is not None else one["status"]
        spent = f"<td>{short(one['cost'], told['unit'])}</td>" if cost else ""
        said = one["text"] + (f" ({one['error']})" if one["error"] else "")
        rows += (
            f'<tr><th scope="row">{one["number"]}</th><td class="words">{safe(said)}</td><td>{value}</td>{spent}'
            f"<td>{safe(ORIGINS.get(one['origin'], '-'))}</td></tr>"
        )
    heads = ["trial", "configuration", told["metric"], *([cost] if cost else []), "came"]
    made = framed("Table of all trials", table("All trials", heads, rows))
    shown = f"<details><summary>{len(told['trials'])} trials</summary>{made}</details>"
    return f"<section><h2>All trials</h2>{shown}</section>"


# Markdown


def markdown(told: Told, drawn: list[Path]) -> str:
    """The search as Markdown, with links to its pictures."""
    metric, cost = told["metric"], told["cost"]
    out = [f"# {told['title']}", "", f"{told['base']} on {told['data']}.", ""]
    out += [*(f"- {one}" for one in sentences(told)), ""]
    heads = ["recipe", "configuration", f"{metric}, trial", f"{metric}, full run", *([cost] if cost else []), "trained"]
    out += lines(heads, (
        [one["file"] or one["name"], one["text"], f"{one['value']:.4g}", _whole(one),
         *([short(one["cost"], told["unit"])] if cost else []), f"{one['trainable']:,}"]
        for one in told["best"]
    ))  # fmt: skip
    out += ["", *(f"![{path.stem}]({path.as_posix()})\n" for path in drawn), "## What the best consist of", ""]
    out += lines(["choice", *(one["name"] for one in told["best"]), "of all trials"], (
        [one["name"], *one["values"], "-" if one["tried"] is None else f"{100 * one['tried']:.0f} %"]
        for one in told["choices"]
    ))  # fmt: skip
    if told["groups"]:
        out += ["", f"## {told['groups']['figure']} by {told['groups']['column']}", ""]
        out += lines(["recipe", "group", "rows", "figure [95 %]"], (
            [one["best"], one["group"] or metric, one.get("rows", ""), _interval(one)]
            for one in told["groups"]["shown"]
        ))  # fmt: skip
    return "\n".join([*out, "", "## How it was found", "", _how(told), ""])
