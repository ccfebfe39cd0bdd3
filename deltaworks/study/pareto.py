"""What a search found: its trials, and the configurations that nobody beats, written as recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..training.recipe import Recipe
from .rows import Row
from .search_spec import Search
from .space import Configuration

PARETO, RESULTS, MOVABLE = "pareto", "results.json", "pareto.json"
"""The folder of recipes; all trials; configurations with their space, which another search may start from."""


@dataclass
class Best:
    """A configuration that none beats in both figure and cost.

    Attributes:
        number: of its trial.
        configuration: as the space has it.
        decided: the keys of a recipe that it decides.
        value, cost: of its trial; the cost is None in a search without one.
        trainable: values that train.
        full: rows of its full runs.
        full_value: mean figure of these, on the rows that nothing was chosen by.
        path: its recipe's file.
    """

    number: int
    configuration: Configuration
    decided: dict[str, Any]
    value: float
    cost: float | None
    trainable: int
    full: list[Row] = field(default_factory=list)
    full_value: float | None = None
    path: Path | None = None


@dataclass
class Found:
    """A finished search.

    Attributes:
        search: what was searched.
        metric, lower: the figure that decided, and whether less of it is better.
        trials: plain records: `number`, `status` ("done", "pruned", "failed"), `error`, `configuration`, `decided`,
            `value`, `cost`, `trainable`, `curve` (step and value), `origin` ("chance", "model", "transfer"), `groups`
            (figures over groups, where it was searched for fairness).
        best: what nobody beats, the cheapest first.
        space: what was chosen from, as plain values.
        importance: how much each choice has to do with a good figure, together 1 (see `search`); empty where too few
            trials finished to say.
        agreement: Spearman's rank correlation of trials and full runs over these, None for fewer than three.
        run: trials and full runs that were run now; the others were known.
    """

    search: Search
    metric: str
    lower: bool
    trials: list[dict[str, Any]]
    best: list[Best]
    space: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    run: int = 0

    @property
    def winner(self) -> Best:
        """The best by the figure alone: of full runs where there are some, else of trials."""
        known = [one for one in self.best if one.full_value is not None] or self.best
        sign = 1 if self.lower else -1
        return min(known, key=lambda one: sign * (one.value if one.full_value is None else one.full_value))


def described(decided: Mapping[str, Any]) -> str:
    """A configuration in a few words, such as `lora rank 4 + ia3 on blocks 0, 3`."""
    settings = decided["settings"]
    methods = settings.get("methods", {decided["method"]: settings}) if decided["method"] == "autopeft" else None
    methods = methods or {decided["method"]: settings}
    parts = []
    for slug, inner in methods.items():
        words = [slug]
        for name, value in inner.items():
            words.append(f"{len(value)} pieces" if name == "on" and isinstance(value, list) else f"{name} {value}")
        parts.append(" ".join(words))
    layers = settings.get("layers") if decided["method"] == "autopeft" else None
    where = f" on blocks {', '.join(map(str, layers))}" if layers is not None else ""
    rate = f" at lr {decided['lr']:g}" if "lr" in decided else ""
    return " + ".join(parts) + where + rate


def write(found: Found, length: Mapping[str, int], folder: Path) -> None:
    """Write `search.yaml`, `results.json`, `pareto.json`, and a recipe for each of the best into `pareto/`."""
    (folder / PARETO).mkdir(parents=True, exist_ok=True)
    for old in (folder / PARETO).glob("*.yaml"):
        old.unlink()
    for place, one in enumerate(found.best, 1):
        slugs = one.decided["settings"].get("methods", {one.decided["method"]: {}})
        one.path = folder / PARETO / f"{place:02d}-{'-'.join(slugs)}.yaml"
        recipe = found.search.recipe(one.decided, **({} if found.search.keys.get("epochs") else length))
        heading = f"# trial {one.number}: {found.metric} {one.value:.6g}, {one.trainable:,} values train\n"
        usual = Recipe().as_dict()
        kept = {name: value for name, value in recipe.as_dict().items() if value != usual[name]}
        always = {name: getattr(recipe, name) for name in ("base", "data", "method")}
        _put(one.path, heading + yaml.safe_dump(always | _plain(kept), sort_keys=False, allow_unicode=True))
    best = [
        {
            "trial": one.number, "configuration": one.configuration, **one.decided, "value": one.value,
            "cost": one.cost, "trainable": one.trainable, "full_value": one.full_value,
            "recipe": f"{PARETO}/{one.path.name}",
            "full": [{name: row.get(name) for name in ("figures", "error", "key")} for row in one.full],
        }
        for one in found.best if one.path is not None
    ]  # fmt: skip
    shown = {"metric": found.metric, "lower": found.lower, "cost": found.search.cost, "agreement": found.agreement,
             "importance": found.importance}  # fmt: skip
    _put(folder / "search.yaml", yaml.safe_dump(_plain(found.search.as_dict()), sort_keys=False, allow_unicode=True))
    _put(folder / RESULTS, json.dumps(shown | {"best": best, "trials": found.trials}, indent=1, default=str) + "\n")
    _put(folder / MOVABLE, json.dumps({"space": found.space, "best": best}, indent=1, default=str) + "\n")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _put(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
