"""A finished study in numbers: what every method reached and cost on each piece of work. Pages are made of this."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .compare import Comparison
from .spec import FULL
from .statistics import LOWER, bootstrap, pareto, win_rates
from .trial import BASE, CONTEXT

COSTS = {
    "trainable": "trained values",
    "stored_bytes": "stored bytes",
    "peak_memory_bytes": "peak memory",
    "step_seconds": "step time",
    "step_flops": "FLOPs of a step",
    "example_flops": "FLOPs of reading",
}
"""What a method costs: column and what a person calls it."""
ALWAYS = ("example_flops",)
"""Costs that what trains nothing has, too: a forward pass for one held-out example, its prompt included."""
SMOOTHED = 25
"""Points of a learning curve, each the mean of the steps it stands for."""

Summary = dict[str, Any]


def summarise(found: Comparison) -> Summary:
    """The whole study as plain values: `title`, `paper`, `expected`, `found`, `axes` and `cells`.

    A cell has `name`, `place`, `metric`, `lower`, `methods`, `pairs` (share of runs in which one beat another),
    `fronts` (names on the Pareto front, by cost) and `works` (base, data and so on). A method has `mean`, `low`,
    `high`, `wins` (against all others together), `runs`, `failed`, `error`, the costs, `curve`, `held_out` and
    `forgetting`; None where there is nothing.
    """
    study = found.study
    return {
        "title": study.title or "Which method?",
        "paper": study.paper,
        "expected": study.expected,
        "found": study.found,
        "budget": study.budget,
        "rates": study.rates,
        "seeds": study.all_seeds,
        "axes": {axis: _values(found, axis) for axis in study.axes},
        "cells": [_cell(found, cell) for cell in found.cells],
    }


def _values(found: Comparison, axis: str) -> list[str]:
    return list(dict.fromkeys(row[f"axis.{axis}"] for row in found.rows))


def _cell(found: Comparison, cell: str) -> Summary:
    lower = found.lower(cell)
    names = list(dict.fromkeys(row["method"] for row in found.of(cell, done=False)))
    values = {name: found.values(cell, name) for name in names}
    pairs = win_rates({name: runs for name, runs in values.items() if runs}, lower)
    methods = [_method(found, cell, name, pairs) for name in names]
    done = [method for method in methods if method["mean"] is not None]
    done.sort(key=lambda method: method["mean"] if lower else -method["mean"])
    first = found.of(cell, done=False)[0]
    return {
        "name": cell,
        "place": {axis: first[f"axis.{axis}"] for axis in found.study.axes},
        "metric": found.metric(cell),
        "lower": lower,
        "works": {name: first[name] for name in ("base", "data", "task", "rows", "held_out", "device", "total")},
        "methods": [*done, *(method for method in methods if method["mean"] is None)],
        "pairs": pairs,
        "fronts": {cost: _front(done, cost, lower) for cost in COSTS},
    }


def _front(methods: Iterable[Summary], cost: str, lower: bool) -> list[str]:
    counted = (one for one in methods if one[cost] and (one["kind"] == "tune" or cost in ALWAYS))
    points = {one["name"]: (one[cost], one["mean"]) for one in counted}
    return pareto(points, lower)


def _method(found: Comparison, cell: str, name: str, pairs: dict[str, dict[str, float]]) -> Summary:
    rows = found.of(cell, name, done=False)
    done = found.of(cell, name)
    first = (done or rows)[0]
    estimate = bootstrap([row["value"] for row in done]) if done else None
    wins = list(pairs.get(name, {}).values())
    return {
        "name": name,
        "slug": first["slug"],
        "family": first["family"],
        "kind": first["kind"],
        "mean": estimate.mean if estimate else None,
        "low": estimate.low if estimate else None,
        "high": estimate.high if estimate else None,
        "values": [row["value"] for row in done],
        "wins": sum(wins) / len(wins) if wins else None,
        "runs": len(done),
        "failed": len(rows) - len(done),
        "error": next((row["error"] for row in rows if row["error"]), None),
        "lr": first["lr"],
        "note": first["note"],
        "settings": first["settings"],
        "mergeable": first["mergeable"],
        "needs_data": first["needs_data"],
        **{cost: _mean(row[cost] for row in done) for cost in COSTS},
        "train_flops": _mean(row["train_flops"] for row in done),
        "share": _mean(
            row["trainable"] / row["total"] for row in done if row["total"] and row["trainable"] is not None
        ),
        "steps": _mean(row["steps"] for row in done),
        "figures": {
            key.removeprefix("figure."): _mean(row.get(key) for row in done)
            for key in sorted({key for row in done for key in row if key.startswith("figure.")})
            if any(row.get(key) is not None for row in done)
        },
        "curve": _curve([(row["loss_steps"], row["losses"]) for row in done]),
        "held_out": _held_out(done),
        "forgetting": _forgetting(done),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [float(value) for value in values if value is not None and math.isfinite(value)]
    return sum(kept) / len(kept) if kept else None


def _curve(curves: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Summary | None:
    """Mean, least and greatest of several curves over the same steps, in at most `SMOOTHED` points."""
    curves = [(steps, values) for steps, values in curves if steps and all(value is not None for value in values)]
    if not curves:
        return None
    length = min(len(steps) for steps, _ in curves)
    stride = -(-length // SMOOTHED)
    groups = [range(start, min(start + stride, length)) for start in range(0, length, stride)]
    each = np.array([[np.mean([values[i] for i in group]) for group in groups] for _, values in curves])
    return {
        "steps": [int(curves[0][0][group[-1]]) for group in groups],
        "mean": each.mean(0).tolist(),
        "low": each.min(0).tolist(),
        "high": each.max(0).tolist(),
    }


def _held_out(done: Sequence[dict[str, Any]]) -> Summary | None:
    """The deciding figure over the steps, from before the first to after the last."""
    if not any(row["evaluation_steps"] for row in done):
        return None
    curves = [
        (
            [0] * (row["before"] is not None) + [*row["evaluation_steps"], row["steps"]],
            [row["before"]] * (row["before"] is not None) + [*row["evaluations"], row["value"]],
        )
        for row in done
    ]
    return _curve(curves)


def _forgetting(done: Sequence[dict[str, Any]]) -> Summary | None:
    """Loss on the base's own domain before and after."""
    known = [row for row in done if row["domain_before"] is not None and row["domain_after"] is not None]
    if not known:
        return None
    after = bootstrap([row["domain_after"] for row in known])
    return {
        "before": _mean(row["domain_before"] for row in known),
        "after": after.mean,
        "low": after.low,
        "high": after.high,
    }


# Numbers for people


def short(value: float | None, unit: str = "") -> str:
    """A number in few letters: `215 k`, `1.3 MiB`, `48 ms`."""
    if value is None:
        return "-"
    if unit == "bytes":
        for name in ("B", "KiB", "MiB", "GiB"):
            if value < 1024 or name == "GiB":
                return f"{value:.3g} {name}" if value < 1000 else f"{value:,.0f} {name}"
            value /= 1024
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    for bound, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:.3g} {name}"
    return f"{value:.3g}"


UNITS = {"stored_bytes": "bytes", "peak_memory_bytes": "bytes", "step_seconds": "s"}


def cost_text(method: Summary, cost: str) -> str:
    """A cost of a method for a person."""
    return short(method[cost], UNITS.get(cost, ""))


def is_full(method: Summary) -> bool:
    """Whether a method is full fine-tuning of everything, not of some modules that its `on` names."""
    return method["slug"] == FULL and json.loads(method["settings"]).get("on", "everything") == "everything"


def best(cell: Summary, keep: Callable[[Summary], bool] = lambda method: True) -> Summary | None:
    """The best finished method of a cell among some."""
    return next((one for one in cell["methods"] if one["mean"] is not None and keep(one)), None)


def sentences(cell: Summary) -> list[str]:
    """What a cell's numbers say, in words."""
    metric, said = cell["metric"], []
    trained = [one for one in cell["methods"] if one["kind"] == "tune" and one["mean"] is not None]
    if trained:
        first = trained[0]
        text = f"Best {metric}: {first['name']}, {interval(first)}"
        tied = [one["name"] for one in trained[1:] if _overlap(first, one)]
        if tied:
            text += f"; within its interval: {', '.join(tied[:6])}" + (" and others" if len(tied) > 6 else "")
        said.append(text + ".")
        front = cell["fronts"]["trainable"]
        small = next((one for one in trained if front and one["name"] == front[0]), None)
        if small is not None and small is not first:
            count = short(small["trainable"])
            said.append(f"Fewest trained values: {small['name']}, {count} of them, {metric} {interval(small)}.")
    for name, what in (
        (BASE, "The base untouched"),
        (CONTEXT, "The base with examples in its prompt"),
        (FULL, "Full fine-tuning"),
    ):
        one = best(cell, lambda method, name=name: method["slug"] == name if name != FULL else is_full(method))
        if one is not None and one is not (trained[0] if trained else None):
            said.append(f"{what}: {interval(one)}.")
    forgot = [one for one in trained if one["forgetting"]]
    if forgot:
        worst = max(forgot, key=lambda one: one["forgetting"]["after"] - one["forgetting"]["before"])
        change = worst["forgetting"]["after"] - worst["forgetting"]["before"]
        if change > 0:
            said.append(
                f"Most forgetting: {worst['name']}, whose loss on the base's own domain rose by {change:.2g} "
                f"to {worst['forgetting']['after']:.4g}."
            )
    failed = [one["name"] for one in cell["methods"] if one["failed"]]
    if failed:
        said.append(f"With runs that failed: {', '.join(failed)}.")
    return said


def interval(method: Summary) -> str:
    """Mean and interval of a method."""
    if method["mean"] is None:
        return "-"
    text = f"{method['mean']:.4g}"
    return text if method["runs"] < 2 else f"{text} ({method['low']:.4g} to {method['high']:.4g})"


def _overlap(one: Summary, other: Summary) -> bool:
    return one["low"] <= other["high"] and other["low"] <= one["high"]


def direction(cell: Summary) -> str:
    """How a figure is to be read."""
    return "less is better" if cell["metric"] in LOWER else "more is better"
