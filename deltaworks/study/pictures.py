"""A study's pictures as PNG, for papers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .summary import ALWAYS, COSTS, UNITS, Summary, short

MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "pentagon": "p", "star": "*",
}  # fmt: skip
LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
INCH = 3.2
LETTERS = 32
"""Letters that have room below a picture; names that have more stand aslant."""


def pictures(summary: Summary, folder: Path) -> list[Path]:
    """Draw, for each piece of work, the costs, the curves and the forgetting, and one picture along each axis.

    Raises:
        ImportError: when matplotlib is missing.
    """
    from .pages import looks, names_of

    folder.mkdir(parents=True, exist_ok=True)
    given = looks(names_of(summary))
    made = []
    for number, cell in enumerate(summary["cells"], 1):
        made.append(saved(_costs(cell, given), folder / f"costs-{number}.png"))
        if any(one["curve"] for one in cell["methods"]):
            made.append(saved(_curves(cell, given), folder / f"learning-{number}.png"))
        if any(one["forgetting"] for one in cell["methods"] if one["kind"] == "tune"):
            made.append(saved(_forgetting(cell, given), folder / f"forgetting-{number}.png"))
    for axis in summary["axes"]:
        for number, group in enumerate(_along(summary, axis), 1):
            name = f"by-{re.sub(r'[^a-z0-9]+', '-', axis.lower())}-{number}.png"
            made.append(saved(_line(axis, group, given), folder / name))
    return made


def new(columns: int = 1, rows: int = 1, size: tuple[float, float] = (1.0, 1.0)) -> tuple[Any, Any]:
    """A figure and its axes, `rows x columns`, each `size` (width, height) times as large as is usual.

    Raises:
        ImportError: when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need a package that is not installed: pip install 'deltaworks[study]'") from None

    width, height = size
    figure = Figure(figsize=(INCH * columns * width, INCH * 0.9 * rows * height), layout="constrained", dpi=200)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def named(axes: Any, points: Sequence[tuple[float, float, str]], taken: Sequence[tuple[float, float]]) -> None:
    """Write the names of points (x, y, name), each where it covers neither a point nor another name.

    Call it last: places depend on the axes. A name for which there is no room is left out.

    Args:
        axes: where the points are.
        points: those with a name, the most important first.
        taken: all points that are drawn.
    """
    figure = axes.figure
    figure.canvas.draw()
    figure.set_layout_engine("none")  # from here on nothing moves
    dots = figure.dpi / 72
    boxes = [(x - 4 * dots, y - 4 * dots, x + 4 * dots, y + 4 * dots) for x, y in axes.transData.transform(taken)]
    frame = axes.get_window_extent()
    if (legend := axes.get_legend()) is not None:
        boxes.append(legend.get_window_extent().extents)
    for x, y, name in points:
        across, up = axes.transData.transform((x, y))
        wide, high = 2.2 * dots * len(name), 4.4 * dots  # half a name of 7 points
        for far, side, rise in itertools.product((9, 16, 24, 34), (0, 1, -1), (1, -1, 0)):
            dx, dy = side * (wide + (far - 4) * dots), rise * far * dots
            box = (across + dx - wide, up + dy - high, across + dx + wide, up + dy + high)
            inside = box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1
            if (side or rise) and inside and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                line = {"arrowstyle": "-", "linewidth": 0.5, "color": "0.5", "shrinkA": 0, "shrinkB": 3}
                axes.annotate(
                    name, (x, y), (dx / dots, dy / dots), textcoords="offset points", ha="center", va="center",
                    fontsize=7, arrowprops=line if far > 9 else None,
                )  # fmt: skip
                break


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def saved(figure: Any, path: Path) -> Path:
    """Write a figure to a file."""
    figure.savefig(path)
    return path


def plain(axes: Any, across: str, up: str) -> None:
    """Name what goes across and up, and leave out what is not needed."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)


def _costs(cell: Summary, given: dict[str, dict[str, str]]) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure, grid = new(4, 2)
    finished = [one for one in cell["methods"] if one["mean"] is not None]
    trained = [one for one in finished if one["kind"] == "tune"]
    places = list(grid.flat)
    for axes, (cost, name) in zip(places, COSTS.items(), strict=False):
        plain(axes, name, cell["metric"])
        known = [one for one in (finished if cost in ALWAYS else trained) if one[cost]]
        front = [next(one for one in known if one["name"] == wanted) for wanted in cell["fronts"][cost]]
        axes.step([one[cost] for one in front], [one["mean"] for one in front], where="post", color="0.6", linewidth=1)
        for one in known:
            look = given[one["name"]]
            error = [[one["mean"] - one["low"]], [one["high"] - one["mean"]]]
            axes.errorbar(
                one[cost], one["mean"], yerr=error, fmt=MARKERS[look["symbol"]], color=look["hex"], markersize=5,
                linewidth=1, label=one["name"],
            )  # fmt: skip
        apart = [one for one in finished if one not in known and one["kind"] != "tune"]
        for place, one in enumerate(apart):  # two that are near each other stand at the two ends
            axes.axhline(one["mean"], color="0.5", linestyle=":", linewidth=1)
            axes.text(
                1 - place % 2, one["mean"], one["name"], transform=axes.get_yaxis_transform(), va="bottom",
                ha="left" if place % 2 else "right", fontsize=7, color="0.4",
            )  # fmt: skip
        if known:
            values = [one[cost] for one in known]
            base = 2 if UNITS.get(cost) == "bytes" else 10
            axes.set_xscale("log", base=base)
            # Powers where there are some, round numbers between the least and the greatest where there are none.
            many, one_place = max(values) > 20 * min(values), max(values) < 1.05 * min(values)
            powers = LogLocator(base, numticks=4 if base == 2 else 5)
            axes.xaxis.set_major_locator(powers if many else MaxNLocator(3))
            if one_place:
                axes.set_xlim(min(values) / 2, max(values) * 2)
                axes.set_xticks([values[0]])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, cost=cost: short(value, UNITS.get(cost, ""))))
            axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in places[len(COSTS) :]:
        axes.axis("off")
    handles, labels = places[0].get_legend_handles_labels()
    places[-1].legend(handles, labels, loc="center", ncols=2 if len(labels) > 8 else 1, fontsize=8, frameon=False)
    return figure


def _curves(cell: Summary, given: dict[str, dict[str, str]]) -> Any:
    parts = [("curve", "training loss")]
    if any(one["held_out"] for one in cell["methods"]):
        parts.append(("held_out", f"held-out {cell['metric']}"))
    figure, grid = new(len(parts) + 1)
    for axes, (part, name) in zip(grid[0], parts, strict=False):
        plain(axes, "step", name)
        for one in cell["methods"]:
            if one[part]:
                look, found = given[one["name"]], one[part]
                axes.fill_between(
                    found["steps"], found["low"], found["high"], color=look["hex"], alpha=0.12, linewidth=0
                )
                axes.plot(
                    found["steps"], found["mean"], color=look["hex"], linestyle=LINES[look["dash"]], linewidth=1.3,
                    label=one["name"],
                )  # fmt: skip
    grid[0][-1].axis("off")
    grid[0][-1].legend(*grid[0][0].get_legend_handles_labels(), loc="center left", fontsize=8, frameon=False)
    return figure


def _forgetting(cell: Summary, given: dict[str, dict[str, str]]) -> Any:
    known = [one for one in cell["methods"] if one["forgetting"] and one["kind"] == "tune"]
    known.sort(key=lambda one: -one["forgetting"]["after"])
    figure, grid = new(2)
    figure.set_figheight(1 + 0.24 * len(known))
    for axes in grid[0][1:]:
        axes.remove()
    axes = figure.axes[0]
    axes.set_subplotspec(axes.get_gridspec()[:])
    plain(axes, "loss on the base's own domain", "")
    for row, one in enumerate(known):
        before, after = one["forgetting"]["before"], one["forgetting"]["after"]
        colour = given[one["name"]]["hex"]
        axes.plot([before, after], [row, row], color=colour, linewidth=2)
        axes.plot(before, row, "o", color="white", markeredgecolor="0.4", markersize=5)
        axes.plot(after, row, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(known)), [one["name"] for one in known])
    return figure


def _along(summary: Summary, axis: str) -> list[list[Summary]]:
    """Cells that differ in one axis only and have one figure, in the axis's order."""
    groups: dict[tuple[Any, ...], list[Summary]] = {}
    for cell in summary["cells"]:
        rest = tuple(value for other, value in cell["place"].items() if other != axis)
        groups.setdefault((rest, cell["metric"]), []).append(cell)
    return [group for group in groups.values() if len(group) > 1]


def _line(axis: str, cells: list[Summary], given: dict[str, dict[str, str]]) -> Any:
    figure, grid = new(2)
    axes, legend = grid[0]
    plain(axes, axis, cells[0]["metric"])
    values = [cell["place"][axis] for cell in cells]
    numbers = [float(value) for value in values if re.fullmatch(r"[0-9.]+(e[+-]?\d+)?", value) and float(value) > 0]
    across = numbers if len(numbers) == len(values) else list(range(len(values)))
    for name, look in given.items():
        points = [
            (x, one)
            for x, cell in zip(across, cells, strict=True)
            for one in cell["methods"]
            if one["name"] == name and one["mean"] is not None
        ]
        if points:
            error = [
                [one["mean"] - one["low"] for _, one in points],
                [one["high"] - one["mean"] for _, one in points],
            ]
            axes.errorbar(
                [x for x, _ in points], [one["mean"] for _, one in points], yerr=error, color=look["hex"],
                marker=MARKERS[look["symbol"]], linestyle=LINES[look["dash"]], markersize=4, linewidth=1.2, label=name,
            )  # fmt: skip
    if across is numbers:
        axes.set_xscale("log")
    axes.set_xticks(across, values, minor=False)
    if across is not numbers and sum(map(len, values)) > LETTERS:
        axes.tick_params(axis="x", labelrotation=30, labelsize=8)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.minorticks_off()
    rest = ", ".join(f"{other} {value}" for other, value in cells[0]["place"].items() if other != axis)
    if rest:
        axes.set_title(rest, fontsize=9)
    legend.axis("off")
    legend.legend(*axes.get_legend_handles_labels(), loc="center left", fontsize=8, frameon=False)
    return figure
