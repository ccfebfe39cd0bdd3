"""Pictures of what the benchmarks found: `NAME(record, path)` draws a record of `bench/results/NAME*.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measure import described

OURS, THEIRS, GOAL = "#2563a8", "#b9a27c", "#c0392b"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 130,
    "legend.frameon": False,
}
Ratio = Mapping[str, float]


def step(record: Mapping[str, Any], path: Path) -> None:
    """A row of bars a method: time over the frozen base's, then time and memory over PEFT's, or full fine-tuning's."""
    rows = {name: row for name, row in record["rows"].items() if row.get("frozen")}
    names = sorted(rows, key=lambda name: -rows[name]["frozen"]["median"])
    panels = [("time / frozen base", "frozen", 1.1)]
    if any(row.get("peft") for row in rows.values()):
        panels += [("time / PEFT", "peft", 1.0), ("saved bytes / PEFT", "peft_saved", 1.0)]
    else:
        panels += [("time / full fine-tuning", "full", 1.0), ("resident / full fine-tuning", "full_rss", 1.0)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(panels),
            sharey=True,
            figsize=(10, 1.6 + 0.21 * len(names)),
            width_ratios=(2, 1, 1),
            layout="constrained",
        )
        for axis, (title, key, goal) in zip(axes, panels, strict=True):
            _bars(axis, names, [rows[name].get(key) for name in names])
            axis.axvline(goal, color=GOAL, linewidth=1)
            axis.set_title(title)
            axis.set_xlabel(f"goal: at most {goal:g}" + (" for LoRA" if key == "frozen" else ""), color=GOAL)
        axes[0].set_ylim(-0.7, len(names) - 0.3)
        size = record["settings"]
        batch = f"{size['dtype']}, batch {size['batch']} x {size['tokens']} tokens"
        _finish(figure, f"A training step of each method, {record['shape']}, {batch}", record, path)


def shapes(record: Mapping[str, Any], path: Path) -> None:
    """A step of LoRA over the frozen base's on each base: ours with both losses, PEFT's, and full fine-tuning."""
    found = record["rows"]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(found), sharex=True, sharey=True, figsize=(2.6 * len(found), 2.4), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis, (label, rows) in zip(grid[0], found.items(), strict=True):
            full, lora, lean = rows.values()
            bars = {"full fine-tuning": full["frozen"], "LoRA, PEFT": lora["peft_frozen"]}
            bars |= {"LoRA, no logits": lean["frozen"], "LoRA": lora["frozen"]}
            _bars(axis, list(bars), list(bars.values()))
            axis.axvline(1.1, color=GOAL, linewidth=1)
            axis.set_title(label.replace(", ", "\n"), fontsize=8)
        grid[0][0].set_xlabel("goal for LoRA: at most 1.1", color=GOAL)
        _finish(figure, "A step over the frozen base's", record, path)


def run(record: Mapping[str, Any], path: Path) -> None:
    """A run of ours beside TRL's: seconds and memory, and their ratios above the bars."""
    rows = {name: row for name, row in record["rows"].items() if "ratios" in row}
    panels = [
        ("training loop, s", "seconds", 1.0), ("whole process, s", "whole_seconds", 1.0),
        ("peak memory above the base, MB", "resident_above_base", 1e-6),
    ]  # fmt: skip
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.6), layout="constrained")
        for axis, (title, key, unit) in zip(axes, panels, strict=True):
            _pairs(axis, rows, key, unit)
            axis.set_title(title)
            goal = record["goals"].get(key)
            axis.set_xlabel(f"goal at matched settings: at most {goal:g} of TRL's" if goal else "")
        _key(figure, "TRL + PEFT")
        _finish(figure, f"deltaworks tune beside TRL's SFTTrainer with PEFT, base {record['shape']}", record, path)


def growth(record: Mapping[str, Any], path: Path) -> None:
    """Small multiples: a column for what grows, a row for what it costs; ours and PEFT's."""
    panels = [("time, ms", "seconds", 1e3), ("saved bytes, MB", "saved_bytes", 1e-6)]
    panels += [("peak memory, MB", "resident_above_base", 1e-6)]
    grown = record["rows"]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(panels), len(grown), figsize=(2.3 * len(grown), 6.6), sharex="col", squeeze=False, layout="constrained"
        )
        for column, (what, sides) in enumerate(grown.items()):
            for line, (title, key, unit) in enumerate(panels):
                axis = grid[line][column]
                for side, colour in (("ours", OURS), ("peft", THEIRS)):
                    points = [(int(x), point[key]) for x, point in sides.get(side, {}).items() if point.get(key)]
                    if points:
                        axis.plot(*zip(*[(x, y * unit) for x, y in points], strict=True), "o-", color=colour, ms=3)
                axis.set_xscale("log", base=2)
                ticks = sorted({int(x) for side in sides.values() for x in side})
                axis.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 4096 else str(tick) for tick in ticks])
                axis.minorticks_off()
                axis.set_ylim(bottom=0)
                axis.grid(axis="y", color="#0002")
                if not axis.lines:
                    axis.set_yticks([])
                    axis.annotate("no backward pass", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#666")
                if column == 0:
                    axis.set_ylabel(title)
            grid[0][column].set_title(what)
        _key(figure)
        _finish(figure, f"What LoRA costs as things grow, {record['settings']['dtype']}", record, path)


def finished(record: Mapping[str, Any], path: Path) -> None:
    """Seconds and memory of what is done with finished adapters, on logarithmic axes."""
    rows = record["rows"]
    panels = [("seconds", "seconds", 1.0), ("peak memory added, MB", "memory", 1e-6)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, sharey=True, figsize=(10, 1.4 + 0.5 * len(rows)), layout="constrained")
        names = list(rows)[::-1]
        for axis, (title, key, unit) in zip(axes, panels, strict=True):
            for place, name in enumerate(names):
                for side, colour, shift in (("ours", OURS, 0.19), ("peft", THEIRS, -0.19)):
                    value = rows[name][side].get(key) if rows[name].get(side) else None
                    if value:
                        axis.barh(place + shift, value * unit, 0.36, color=colour)
                        shown = value * unit
                        text = f" {shown:,.0f}" if shown >= 100 else f" {shown:.2g}"
                        axis.annotate(text, (shown, place + shift), va="center", fontsize=8)
            axis.set_xscale("log")
            axis.margins(x=0.12)
            axis.set_title(title)
        axes[0].set_yticks(range(len(names)), names)
        _key(figure)
        _finish(figure, f"Finished adapters on a base of {record['shape']} shapes", record, path)


def _bars(axis: Axes, names: Sequence[str], ratios: Sequence[Ratio | None]) -> None:
    """Horizontal bars of medians with whiskers from least to greatest; nothing where nothing was measured."""
    for place, value in enumerate(ratios):
        if value is not None:
            whiskers = [[value["median"] - value["min"]], [value["max"] - value["median"]]]
            axis.barh(place, value["median"], 0.7, color=OURS, xerr=whiskers, error_kw={"lw": 0.8, "ecolor": "#333"})
            axis.annotate(
                f"{value['median']:.2f}", (0, place), xytext=(3, 0), textcoords="offset points", va="center",
                fontsize=7.5, color="white",
            )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(left=0)


def _pairs(axis: Axes, rows: Mapping[str, Any], key: str, unit: float) -> None:
    """Two bars a row, ours and TRL's, and the ratio of the two above ours."""
    for place, row in enumerate(rows.values()):
        for side, colour, shift in (("ours", OURS, -0.19), ("trl", THEIRS, 0.19)):
            value = row[side].get(key)
            if value is not None:
                axis.bar(place + shift, value * unit, 0.36, color=colour)
        quotient, mine = row["ratios"].get(key), row["ours"].get(key)
        if quotient and mine:
            axis.annotate(
                f"{quotient['median']:.2f}", (place - 0.19, mine * unit), ha="center", va="bottom", fontsize=8
            )
    axis.set_xticks(range(len(rows)), rows, rotation=20 if len(rows) > 3 else 0)
    axis.margins(y=0.15)


def _key(figure: Figure, theirs: str = "PEFT") -> None:
    marks = [plt.Line2D([], [], color=colour, lw=6) for colour in (OURS, THEIRS)]
    figure.legend(marks, ["ours", theirs], loc="outside upper right", ncols=2)


def _finish(figure: Figure, title: str, record: Mapping[str, Any], path: Path) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    wide = math.ceil(figure.get_figwidth() * 15)
    text = f"{described(record)}\n{record['command']}"
    figure.supxlabel("\n".join(_wrapped(line, wide) for line in text.splitlines()), x=0.01, ha="left", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _wrapped(line: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(line, width)) or line
