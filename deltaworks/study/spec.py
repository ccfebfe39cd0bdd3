"""A study: what is compared, on what, how often; one YAML file, or a command's options.

title: Which method for docstrings?
base: nursery:decoder                 # every key of a recipe may stand here, for all runs
data: nursery:docstrings
steps: 100
methods: [lora, {method: dora, name: DoRA 32, settings: {rank: 32}}]
seeds: 3
axes:                                 # what else differs: every combination is a piece of work of its own
  limit: [100, 1000]                  # a key of a recipe with its values,
  size:                               # or any name, with values that set several keys
    - {name: small, base: nursery:decoder-xs}
    - {name: large, base: nursery:decoder-m, batch_size: 4}
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..core import fields
from ..core.registry import find, methods
from ..training import yaml_file
from ..training.recipe import Recipe
from . import memory
from .recipe_keys import FIXED, RECIPE, filled, flat, own_keys, parted, refuse_unknown
from .trial import BASE, CONTEXT
from .work import library

FULL = "full"
BASELINES = (BASE, CONTEXT, FULL)
BUDGETS = ("params", "bytes", "memory", "time")
PER_CELL = ("metric", "domain", "context_examples")
"""Keys of a study that an axis may set, too."""
INSTEAD = {
    name: f"{name} is not set here; use {use}"
    for name, use in (("method", "methods"), ("seed", "seeds"), ("output", "the command's --output"))
}


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _seeds(value: Any) -> bool:
    return _whole(value, 1) or (
        filled(value) and all(_whole(one, 0) for one in value) and len(set(value)) == len(value)
    )


def _rates(value: Any) -> bool:
    numbers = filled(value) and all(isinstance(one, (int, float)) and one > 0 for one in value)
    return _whole(value, 0) or numbers


@dataclass(frozen=True)
class Entry:
    """What is compared: a method with settings, under a name."""

    name: str
    keys: dict[str, Any]

    @property
    def slug(self) -> str:
        return self.keys["method"]


@dataclass(frozen=True)
class Cell:
    """A piece of work on which all are compared: one value of every axis."""

    place: dict[str, str]
    keys: dict[str, Any]
    metric: str | None
    domain: str | None
    context_examples: int

    @property
    def name(self) -> str:
        return ", ".join(f"{axis} {label}" for axis, label in self.place.items())


@dataclass(kw_only=True, frozen=True)
class Study:
    """A comparison, as a person describes it. `keys` are those of the recipe that all its runs share.

    Raises:
        ValueError: one line, for what does not exist or cannot be.
    """

    slug: ClassVar[str] = "study"

    title: str | None = fields.text(None, "what the page is called")
    paper: str | None = fields.text(None, "the published comparison that this one follows")
    expected: str | None = fields.text(None, "what the paper found")
    found: str | None = fields.text(None, "what this study found, in words")
    methods: list[Any] = fields.declared(
        ["lora"], "what is compared: slugs, families, `all`, or mappings of recipe keys with a name",
        "a list of slugs, families or mappings", filled,
    )  # fmt: skip
    baselines: list[str] = fields.declared(
        list(BASELINES), "what they are compared with", f"a list of {', '.join(BASELINES)}",
        lambda v: isinstance(v, list) and all(one in BASELINES for one in v),
    )  # fmt: skip
    axes: dict[str, Any] = fields.mapping("what else differs: name -> values")
    seeds: int | list[int] = fields.declared(
        3, "how often each is run, or the seeds themselves", "a whole number of at least 1, or a list of seeds", _seeds,
    )  # fmt: skip
    metric: str | None = fields.text(
        None, "the figure that decides; by default accuracy, rmse or loss, as the task has it"
    )
    rates: int | list[float] = fields.declared(
        5, "short runs by which each method's learning rate is chosen, 0 for its own; or the rates to choose from",
        "a whole number, or a list of learning rates", _rates,
    )  # fmt: skip
    rate_steps: float = fields.number(0.3, "steps of such a run; below 1 a share of the whole run's", above=0)
    rate_axes: list[str] | None = fields.declared(
        None, "axes along which rates are chosen anew; all by default", "a list of axes",
        lambda v: v is None or isinstance(v, list),
    )  # fmt: skip
    budget: str | None = fields.text(
        None, "params=N, bytes=N, memory=N or time=N: sizes are chosen so that all come to it"
    )
    context_examples: int = fields.positive(4, "training examples in the prompt, for the in-context baseline")
    domain: str | None = fields.text(
        "auto", "text of the base's own domain, on which forgetting is measured; none, or auto for the nursery's"
    )
    keys: dict[str, Any] = fields.mapping("keys of a recipe, for all runs")

    def __post_init__(self) -> None:
        fields.checked(self)
        for name in self.keys:
            _recipe_key(name)
        if self.budget is not None:
            self.budgeted()
        for axis in self.rate_axes or ():
            if axis not in self.axes:
                raise ValueError(f"study: rate_axes has {axis!r}; the axes are {', '.join(self.axes) or 'none'}")
        entries, cells = self.entries(), self.cells()
        for cell in cells[:1]:
            for entry in entries:
                self.recipe(cell, entry, 0)

    @property
    def all_seeds(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def budgeted(self) -> tuple[str, float] | None:
        """What is equalised and to how much: parameters, bytes or seconds.

        Raises:
            ValueError: when it cannot be understood.
        """
        if self.budget is None:
            return None
        kind, equals, text = self.budget.partition("=")
        if kind not in BUDGETS or not equals:
            raise ValueError(f"budget {self.budget!r} is not understood; write {'=N, '.join(BUDGETS)}=N")
        return kind, amount(text, {"time": "seconds", "params": "count"}.get(kind, "bytes"))

    def entries(self) -> list[Entry]:
        """What is compared, full fine-tuning among it when it is a baseline.

        Raises:
            ValueError: for an unknown method or family, or two of one name.
        """
        known = methods()
        families = {cls.family for cls in known.values()}
        found: list[Entry] = []
        for item in self.methods:
            if isinstance(item, Mapping):
                keys = dict(item)
                name = keys.pop("name", None)
                if "method" not in keys:
                    raise ValueError(f"study: an entry of methods names no method: {dict(item)}")
                for key in keys:
                    _recipe_key(key, allowed=("method",))
                keys["method"] = find(keys["method"]).slug
                found.append(Entry(str(name or keys["method"]), keys))
            elif item == "all":
                found += [Entry(slug, {"method": slug}) for slug in known if slug != FULL]
            elif item in families:
                found += [Entry(slug, {"method": slug}) for slug, cls in known.items() if cls.family == item]
            else:
                slug = find(str(item)).slug
                found.append(Entry(slug, {"method": slug}))
        if FULL in self.baselines and not any(entry.slug == FULL for entry in found):
            found.append(Entry(FULL, {"method": FULL}))
        unique: dict[str, Entry] = {}
        for entry in found:
            if unique.setdefault(entry.name, entry).keys != entry.keys or entry.name in (BASE, CONTEXT):
                raise ValueError(f"study: two entries are called {entry.name!r}; give each a name of its own")
        return list(unique.values())

    def cells(self) -> list[Cell]:
        """Every combination of the axes' values, one without any where there are no axes."""
        axes = [_axis(name, values) for name, values in self.axes.items()]
        made = []
        for combination in itertools.product(*axes):
            place = {axis: label for axis, label, _ in combination}
            keys: dict[str, Any] = dict(self.keys)
            own: dict[str, Any] = {name: getattr(self, name) for name in PER_CELL}
            for _, _, values in combination:
                own |= {name: value for name, value in values.items() if name in PER_CELL}
                keys |= {name: value for name, value in values.items() if name not in PER_CELL}
            if own["domain"] == "auto":
                own["domain"] = library(str(keys.get("base", Recipe.base)))
            elif own["domain"] == "none":
                own["domain"] = None
            made.append(Cell(place, keys, **own))
        return made

    def recipe(self, cell: Cell, entry: Entry, seed: int, **changed: Any) -> Recipe:
        """The recipe of a run. What an entry says wins over the axes, and those over the study."""
        return Recipe.of(cell.keys, entry.keys, changed, {"seed": seed})

    def rate_place(self, cell: Cell) -> tuple[tuple[str, str], ...]:
        """Cells of the same place have their rates chosen once."""
        axes = self.axes if self.rate_axes is None else self.rate_axes
        return tuple((axis, label) for axis, label in cell.place.items() if axis in axes)

    def as_dict(self) -> dict[str, Any]:
        """The keys as a YAML file has them."""
        return flat(self)

    def text(self) -> str:
        """The study as YAML."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def of(cls, *sources: Mapping[str, Any]) -> Study:
        """A study of several mappings, later ones winning; keys are its own or a recipe's.

        Raises:
            ValueError: for an unknown key, naming the nearest.
        """
        own, keys = parted(cls, sources, lambda name: _recipe_key(name, others=own_keys(cls)))
        for name in ("methods", "baselines", "rate_axes"):
            if isinstance(own.get(name), str):
                own[name] = own[name].replace(",", " ").split()
        return cls(**own, keys=keys)

    @classmethod
    def read(cls, path: str | Path, **options: Any) -> Study:
        """A study from a YAML file, with options that win over it.

        Raises:
            OSError: when the file cannot be read.
            ValueError: when it is not a study.
        """
        return yaml_file.read(path, options, cls.of, kind=cls.slug, example="methods")


def _recipe_key(name: Any, allowed: Sequence[str] = (), others: Iterable[str] = ()) -> None:
    """Refuse what is no key of a recipe, or one that a study sets itself."""
    known = [key for key in RECIPE if key not in FIXED or key in allowed]
    refuse_unknown("study", name, known, others, INSTEAD)


def _axis(name: str, values: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """An axis's values: (axis, label, keys) each.

    Raises:
        ValueError: for values that say nothing, or two of one label.
    """
    if not filled(values):
        raise ValueError(f"study: axis {name!r} must be a list of values, not {values!r}")
    made = []
    for value in values:
        if isinstance(value, Mapping) and name not in ("settings", "columns"):
            keys = dict(value)
            label = keys.pop("name", None)
            if label is None:
                label = " ".join(str(one) for one in keys.values())
            for key in keys:
                if key not in PER_CELL:
                    _recipe_key(key, others=PER_CELL)
        else:
            key = name.replace("-", "_")
            if key not in PER_CELL:
                _recipe_key(key, others=PER_CELL)
            keys, label = {key: value}, value
            if isinstance(value, Mapping):
                label = ", ".join(f"{one} {other}" for one, other in value.items())
        made.append((name, str(label), keys))
    labels = [label for _, label, _ in made]
    if len(set(labels)) < len(labels):
        raise ValueError(f"study: axis {name!r} has two values called {max(labels, key=labels.count)!r}")
    return made


_UNITS = {
    "seconds": {"": 1.0, "s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0},
    "count": {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9},
}  # fmt: skip


def amount(text: str, unit: str = "count") -> float:
    """A number as people write it: `8GiB` ("bytes"), `90s` or `2min` ("seconds"), `1e5` or `100k` ("count").

    Raises:
        ValueError: for anything else.
    """
    if unit == "bytes":
        return float(memory.parse(text))
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    try:
        assert found is not None
        number = float(found[1]) * _UNITS[unit][found[2]]
    except (AssertionError, ValueError, KeyError):
        units = ", ".join(name for name in _UNITS[unit] if name)
        raise ValueError(f"{text!r} is not an amount; write a number, or one with {units}") from None
    if number <= 0:
        raise ValueError(f"{text!r} is not an amount; it must be above 0")
    return number
