"""A search's pictures as PNG, for papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .page_parts import COLOURS
from .pictures import MARKERS, named, new, plain, saved
from .summary import short

Told = dict[str, Any]
SHAPES = list(MARKERS.values())
LOOKS = {"chance": ("o", "none"), "model": ("D", None), "transfer": ("s", None)}


def pictures(told: Told, folder: Path) -> list[Path]:
    """Draw the Pareto front, the trials in their order, the importance of choices, and the groups.

    Args:
        told: a search as `search_pages.tell` gives it.
        folder: gets `front.png`, `order.png`, and where there is something to show `importance.png` and `groups.png`.

    Raises:
        ImportError: when matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"front": _front(told) if told["cost"] else None, "order": _order(told)}
    drawn |= {"importance": _importance(told) if told["importance"] else None}
    drawn |= {"groups": _groups(told) if told["groups"] else None}
    return [saved(figure, folder / f"{name}.png") for name, figure in drawn.items() if figure is not None]


def _points(axes: Any, told: Told, across: str) -> list[Told]:
    from .search_pages import ORIGINS

    done = [one for one in told["trials"] if one["value"] is not None]
    for number, (origin, text) in enumerate(ORIGINS.items()):
        some = [one for one in done if one["origin"] == origin]
        if some:
            shape, face = LOOKS[origin]
            axes.plot(
                [one[across] for one in some], [one["value"] for one in some], shape, color=COLOURS[number],
                markerfacecolor=face or COLOURS[number], markersize=4, linestyle="none", label=text,
            )  # fmt: skip
    return done


def _front(told: Told) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure, grid = new(size=(1.6, 1.2))
    axes = grid[0][0]
    plain(axes, told["cost"], told["metric"])
    best = told["best"]
    axes.step([one["cost"] for one in best], [one["value"] for one in best], where="post", color="0.6", linewidth=1)
    done = _points(axes, told, "cost")
    full = [one for one in best if one["full"]]
    if full:
        means = [one["full"]["mean"] for one in full]
        error = [
            [one["full"]["mean"] - one["full"]["low"] for one in full],
            [one["full"]["high"] - one["full"]["mean"] for one in full],
        ]
        axes.errorbar(
            [one["cost"] for one in full], means, yerr=error, fmt="o", color="black", markerfacecolor="none",
            markersize=7, linewidth=1, label="full runs",
        )  # fmt: skip
    values = [one["cost"] for one in done]
    if min(values) > 0 and max(values) > min(values):
        base, span = (2 if told["unit"] == "bytes" else 10), max(values) / min(values)
        axes.set_xscale("log", base=base)
        steps = (1.0,) if span > 50 or base == 2 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(base, steps, numticks=5) if span > 4 else MaxNLocator(4))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, told["unit"])))
    axes.legend(fontsize=7, frameon=False)
    taken = [(one["cost"], one["value"]) for one in done] + [
        (one["cost"], one["full"][end]) for one in full for end in ("low", "mean", "high")
    ]
    named(axes, [(one["cost"], one["value"], one["name"]) for one in best], taken)
    return figure


def _order(told: Told) -> Any:
    figure, grid = new(size=(1.6, 1.0))
    axes = grid[0][0]
    plain(axes, "trial", told["metric"])
    done = _points(axes, told, "number")
    line: list[float] = []
    for one in done:
        better = min if told["lower"] else max
        line.append(better(line[-1], one["value"]) if line else one["value"])
    axes.step([one["number"] for one in done], line, where="post", color="0.6", linewidth=1)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _importance(told: Told) -> Any:
    shares = told["importance"][::-1]
    figure, grid = new(size=(1.6, 0.25 + 0.08 * len(shares)))
    axes = grid[0][0]
    plain(axes, "share", "")
    axes.barh([one["name"] for one in shares], [100 * one["share"] for one in shares], color=COLOURS[0])
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.tick_params(axis="y", labelsize=7)
    return figure


def _groups(told: Told) -> Any:
    groups, every = told["groups"], [one["name"] for one in told["best"]]
    figure, grid = new(size=(max(1.6, 0.35 * len(every)), 1.1))
    axes = grid[0][0]
    plain(axes, "recipe", groups["figure"])
    for index, (name, rows) in enumerate(groups["names"].items()):
        some = [one for one in groups["shown"] if one["group"] == name and one["value"] is not None]
        apart = (index - (len(groups["names"]) - 1) / 2) * min(0.18, 0.7 / len(groups["names"]))
        error = [
            [0 if one["low"] is None else one["value"] - one["low"] for one in some],
            [0 if one["high"] is None else one["high"] - one["value"] for one in some],
        ]
        axes.errorbar(
            [every.index(one["best"]) + apart for one in some], [one["value"] for one in some], yerr=error,
            fmt=SHAPES[index % len(SHAPES)], color=COLOURS[index % len(COLOURS)], markersize=4, linewidth=1,
            label=f"{name} ({rows} rows)",
        )  # fmt: skip
    axes.set_xticks(range(len(every)), every)
    axes.set_xlim(-0.6, len(every) - 0.4)
    axes.legend(fontsize=7, frameon=False)
    return figure
