"""Which method to take: a short list from a finished study, for what one can afford."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..core.method import Method
from ..core.registry import make
from .compare import read
from .spec import FULL
from .summary import Summary, is_full, short, summarise
from .trial import BASE

BUILT_IN = "nursery.json"
KEPT = (
    "name", "slug", "family", "kind", "mean", "low", "high", "runs", "wins", "trainable", "stored_bytes",
    "peak_memory_bytes", "step_seconds", "step_flops", "share", "lr", "settings", "mergeable", "needs_data",
    "forgetting", "error",
)  # fmt: skip
"""What the built-in table holds of a method."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one can afford; None for no limit.

    Attributes:
        memory: bytes at the peak of training.
        params: values that train.
        stored: bytes of the adapter.
        step: seconds of a step.
        mergeable: only methods that can be folded into the base, or only those that cannot.
        data_free: only methods that need no data before they attach.
        gains: only methods that nowhere ended worse than the base.
    """

    memory: float | None = None
    params: float | None = None
    stored: float | None = None
    step: float | None = None
    mergeable: bool | None = None
    data_free: bool = False
    gains: bool = False


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with what a study knows of it.

    Attributes:
        gain: its share of the best gain over the base, averaged over the pieces of work; 1 is the best throughout.
        worst: the least of these shares.
        costs: `trainable`, `stored_bytes`, `peak_memory_bytes`, `step_seconds`, `step_flops`, averaged, or as planned
            on a base.
        relative: the same over those of full fine-tuning, where it was in the study.
        where: its figure on each piece of work, in words.
    """

    name: str
    slug: str
    settings: dict[str, Any]
    gain: float
    worst: float
    costs: dict[str, float | None]
    relative: dict[str, float | None]
    where: list[str]
    mergeable: bool
    needs_data: bool
    lr: float | None
    planned: bool = False
    why_not: str | None = None
    reason: str = field(default="")


COSTS = ("trainable", "stored_bytes", "peak_memory_bytes", "step_seconds", "step_flops")


def table(study: str | Path | None = None) -> list[Summary]:
    """The pieces of work of a finished study, of the built-in one when none is named.

    Raises:
        ValueError: when there is no finished study.
    """
    if study is None:
        return json.loads((files(__spec__.parent) / BUILT_IN).read_text(encoding="utf-8"))["cells"]
    return summarise(read(study))["cells"]


def kept(summary: Summary) -> Summary:
    """What the built-in table holds of a study."""
    cells = [
        {name: cell[name] for name in ("name", "place", "metric", "lower", "works")}
        | {"methods": [{name: one[name] for name in KEPT} for one in cell["methods"]]}
        for cell in summary["cells"]
    ]
    return {"title": summary["title"], "seeds": summary["seeds"], "cells": cells}


def recommend(
    cells: Sequence[Summary],
    limits: Limits,
    *,
    task: str | None = None,
    planned: dict[str, dict[str, Any]] | None = None,
) -> tuple[list[Candidate], list[Candidate]]:
    """Methods in order of what they gain, and those that break a limit, with the reason of each.

    Args:
        cells: what `table` gave.
        limits: what one can afford.
        task: only pieces of work of this task count.
        planned: costs on one's own base by method's name, which then count instead of the study's.

    Raises:
        ValueError: when no piece of work is of that task.
    """
    used = [cell for cell in cells if task in (None, cell["works"]["task"])]
    if not used:
        known = sorted({str(cell["works"]["task"]) for cell in cells})
        raise ValueError(f"the study has no work of task {task!r}; it has {', '.join(known)}")
    found = [one if planned is None else _on_base(one, planned) for one in candidates(used)]
    found.sort(key=lambda one: (-one.gain, one.costs["trainable"] or 0))
    judged = [replace(one, why_not=one.why_not or _against(one, limits)) for one in found]
    good = [replace(one, reason=_reason(one, place)) for place, one in enumerate(_fitting(judged))]
    return good, [replace(one, reason=f"{one.name} is left out: {one.why_not}.") for one in judged if one.why_not]


def _fitting(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [one for one in candidates if one.why_not is None]


def candidates(cells: Sequence[Summary]) -> list[Candidate]:
    """Every method that trained on some of the pieces of work; one that did not on all says why it is no choice."""
    names = list(dict.fromkeys(one["name"] for cell in cells for one in cell["methods"] if one["kind"] == "tune"))
    found = []
    for name in names:
        both = [(cell, one) for cell in cells for one in cell["methods"] if one["name"] == name]
        ours = [(cell, one) for cell, one in both if one["mean"] is not None]
        if not ours:
            continue
        shares = [_share(cell, one) for cell, one in ours]
        full = [(one, other) for cell, one in ours for other in cell["methods"] if is_full(other)]
        first = ours[0][1]
        found.append(
            Candidate(
                name=name,
                slug=first["slug"],
                settings=json.loads(first["settings"]),
                gain=sum(shares) / len(cells),
                worst=min(shares) if len(ours) == len(cells) else 0.0,
                costs={cost: _mean([one[cost] for _, one in ours]) for cost in COSTS},
                relative={cost: _mean([_over(one[cost], other[cost]) for one, other in full]) for cost in COSTS},
                where=[f"{cell['metric']} {one['mean']:.4g}" + _at(cell) for cell, one in ours],
                mergeable=first["mergeable"],
                needs_data=first["needs_data"],
                lr=first["lr"],
                why_not="; ".join(f"no result{_at(cell)}: {one['error']}" for cell, one in both if one["mean"] is None)
                or None,
            )
        )
    return found


def _at(cell: Summary) -> str:
    place = " ".join(cell["place"].values())
    return f" on {place}" if place else ""


def _share(cell: Summary, one: Summary) -> float:
    """A method's gain over the base as a share of the best one's; without the base, over the worst of all."""
    sign = -1 if cell["lower"] else 1
    trained = [
        sign * other["mean"] for other in cell["methods"] if other["kind"] == "tune" and other["mean"] is not None
    ]
    base = next((sign * other["mean"] for other in cell["methods"] if other["slug"] == BASE), None)
    start = base if base is not None and base < max(trained) else min(trained)
    span = max(trained) - start
    return (sign * one["mean"] - start) / span if span > 0 else 1.0


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _on_base(one: Candidate, planned: dict[str, dict[str, Any]]) -> Candidate:
    """The candidate with the costs it would have on another base."""
    here = planned[one.name]
    if here.get("reason"):
        return replace(one, why_not=here["reason"], planned=True)
    full = next((costs for name, costs in planned.items() if costs.get("slug") == FULL and not costs.get("reason")), {})
    costs = {cost: here.get(cost) for cost in COSTS}
    return replace(
        one, costs=costs, relative={cost: _over(costs[cost], full.get(cost)) for cost in COSTS}, planned=True
    )


def plan_on(base: str, cells: Sequence[Summary], **options: Any) -> dict[str, dict[str, Any]]:
    """What the methods of a study would cost on a base, by name; no weight is loaded.

    Args:
        base: as `--base` takes it.
        options: further keys of a recipe, such as `batch_size`.

    Raises:
        ValueError, OSError: when there is no such base.
    """
    from ..training.recipe import Recipe
    from .plan import plan

    recipe, found = Recipe.of({"base": base, **options}), {}
    waiting = candidates(cells)
    while waiting:
        # The base is described once for all of them; of one slug with several settings only the first at a time.
        now = {one.slug: one for one in reversed(waiting)}
        waiting = [one for one in waiting if now[one.slug] is not one]
        made = plan(recipe, [_method(one) for one in now.values()], search=False)
        for slug, one in now.items():
            found[one.name] = {"slug": slug, "reason": made.reasons.get(slug)}
        for forecast in made.forecasts:
            found[now[forecast.method].name] |= {
                "trainable": forecast.trainable,
                "stored_bytes": forecast.stored_bytes,
                "peak_memory_bytes": forecast.peak,
            }
    return found


def _method(one: Candidate) -> Method:
    return make(one.slug, **{name: value for name, value in one.settings.items() if name != "overrides"})


def _against(one: Candidate, limits: Limits) -> str | None:
    """Which limit a candidate breaks, None when none."""
    if limits.gains and one.worst < 0:
        return f"worse than the base somewhere: {'; '.join(one.where)}"
    for limit, cost, what, unit in (
        (limits.memory, "peak_memory_bytes", "memory at the peak", "bytes"),
        (limits.params, "trainable", "trained values", ""),
        (limits.stored, "stored_bytes", "stored", "bytes"),
        (limits.step, "step_seconds", "a step", "s"),
    ):
        value = one.costs[cost]
        if limit is not None and value is None:
            return f"{what} is not known"
        if limit is not None and value is not None and value > limit:
            return f"{short(value, unit)} {what}, the limit is {short(limit, unit)}"
    if limits.mergeable is not None and one.mergeable != limits.mergeable:
        return "it does not merge into the base" if limits.mergeable else "it merges into the base"
    if limits.data_free and one.needs_data:
        return "it needs data before it attaches"
    return None


def _reason(one: Candidate, place: int) -> str:
    """Why it stands where it stands, in one sentence."""
    gain = f"{round(100 * one.gain)} % of the best gain over the base"
    if len(one.where) > 1:
        gain += f" on average, {round(100 * one.worst)} % at worst"
    trained = f"{short(one.costs['trainable'])} trained values" if one.costs["trainable"] is not None else ""
    share = one.relative.get("trainable")
    if share is not None and one.slug != FULL:
        trained += f" ({float(f'{100 * share:.2g}'):g} % of full fine-tuning’s)"
    parts = [part for part in (trained, _memory(one), _speed(one)) if part]
    ends = "it merges into the base" if one.mergeable else "it stays beside the base"
    if one.needs_data:
        ends += " and needs data before it attaches"
    lead = "gains most within the limits, " if place == 0 else "gains "
    return f"{one.name} {lead}{gain} ({'; '.join(one.where)}), with {', '.join(parts)}; {ends}."


def _memory(one: Candidate) -> str:
    value = one.costs["peak_memory_bytes"]
    if value is None:
        return ""
    over = one.relative.get("peak_memory_bytes")
    return f"{short(value, 'bytes')} at the peak" + (f" ({over:.2f} times full’s)" if over and one.slug != FULL else "")


def _speed(one: Candidate) -> str:
    over = one.relative.get("step_flops")
    return f"{over:.2f} times full’s operations a step" if over and one.slug != FULL else ""
