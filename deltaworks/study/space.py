"""What a search chooses from: methods with their sizes, blocks, pieces of the base, a learning rate.

A configuration is a mapping of whole numbers: `size.NAME` counts a method's sizes from 1, 0 leaves it out; `layer.I` is
1 where block I is changed; `piece.I.NAME` is 1 where that piece of the base trains; `rate` is a learning rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from ..core.costs import size_on
from ..core.registry import find, make
from ..model.anatomy import Anatomy, describe
from .sizes import size_names

Configuration = dict[str, Any]
PIECES = ("norm", "attention", "mlp", "block")
AS_PUBLISHED: dict[str, dict[str, Any]] = {"prefix_tuning": {"hidden": 800}}
"""Hyper-parameters of AutoPEFT's modules that are not ours by default."""
COUNTED = 4096
"""A space of at most so many configurations is looked through as a whole when chance finds nothing new."""


@dataclass(frozen=True)
class Choice:
    """A method that may be in a configuration.

    Attributes:
        slug: which.
        settings: hyper-parameters that do not change.
        sizes: what changes, a mapping of hyper-parameters for each size, the smallest first; one empty mapping where
            there is nothing to choose but whether it is there.
    """

    slug: str
    settings: dict[str, Any]
    sizes: tuple[dict[str, Any], ...]

    def at(self, number: int) -> dict[str, Any]:
        """The hyper-parameters of a size, counted from 1."""
        return self.settings | self.sizes[number - 1]


@dataclass(frozen=True)
class Space:
    """All configurations of a search.

    Attributes:
        choices: methods.
        layers: how many blocks are chosen among, 0 where all are changed.
        pieces: paths of the base's modules by piece, `I.NAME`.
        rates: lowest and highest learning rate, None where it is not chosen.
        head: what trains where no piece does, None where there is no new head and that would be nothing.
    """

    choices: tuple[Choice, ...] = ()
    layers: int = 0
    pieces: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rates: tuple[float, float] | None = None
    head: str | None = None

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The space as Optuna sees it: sizes and bits as whole numbers, as in AutoPEFT's encoding."""
        found: dict[str, BaseDistribution] = {
            f"size.{one.slug}": IntDistribution(0, len(one.sizes)) for one in self.choices
        }
        found |= {f"layer.{number}": IntDistribution(0, 1) for number in range(self.layers)}
        found |= {f"piece.{name}": IntDistribution(0, 1) for name in self.pieces}
        if self.rates is not None:
            found["rate"] = FloatDistribution(*self.rates, log=True)
        return found

    def count(self) -> float:
        """How many configurations there are, empty ones among them."""
        if self.rates is not None:
            return math.inf
        return math.prod(len(one.sizes) + 1 for one in self.choices) * 2 ** (self.layers + len(self.pieces))

    def every(self) -> Iterator[Configuration]:
        """All configurations of a space without rates."""
        spread = {name: range(one.high + 1) for name, one in self.distributions.items()}  # type: ignore[attr-defined]
        for values in itertools.product(*spread.values()):
            yield dict(zip(spread, values, strict=True))

    def empty(self, found: Configuration) -> bool:
        """Whether a configuration changes nothing."""
        if (self.head is None or not self.pieces) and not self._methods(found):
            return True
        return self.layers > 0 and not self._layers(found)

    def recipe(self, found: Configuration) -> dict[str, Any]:
        """The keys of a recipe that a configuration decides: `method`, `settings`, `lr`.

        Raises:
            ValueError: for an empty one.
        """
        if self.empty(found):
            raise ValueError("the configuration changes nothing: it has no method, or no layer")
        rate = {} if self.rates is None else {"lr": float(f"{found['rate']:.3g}")}
        methods = self._methods(found) or {"full": {"on": [self.head]}}
        layers = self._layers(found) if self.layers else None
        if len(methods) == 1 and (layers is None or len(layers) == self.layers):
            ((slug, settings),) = methods.items()
            return {"method": slug, "settings": settings} | rate
        chosen = {} if layers is None or len(layers) == self.layers else {"layers": layers}
        return {"method": "autopeft", "settings": {"methods": methods} | chosen} | rate

    def key(self, found: Configuration) -> str:
        """The same for configurations that do the same."""
        return "" if self.empty(found) else json.dumps(self.recipe(found), sort_keys=True)

    def _methods(self, found: Configuration) -> dict[str, dict[str, Any]]:
        there = {one.slug: one.at(found[f"size.{one.slug}"]) for one in self.choices if found[f"size.{one.slug}"]}
        trained = [path for name, paths in self.pieces.items() if found[f"piece.{name}"] for path in paths]
        if trained:
            there["full"] = {"on": [re.escape(path) for path in trained]}
        return there

    def _layers(self, found: Configuration) -> list[int]:
        return [number for number in range(self.layers) if found[f"layer.{number}"]]

    # Transfer

    def plain(self) -> dict[str, Any]:
        """The space as plain values, to be read by `moved`."""
        return dataclasses.asdict(self)

    def moved(self, found: Configuration, other: Mapping[str, Any]) -> Configuration:
        """A configuration of another space as the nearest one of this.

        Sizes keep their values as near as there are any; block i is what the block at the same share of the depth was;
        what the other space does not know is left out, and a rate is brought between the bounds.
        """
        made: Configuration = {}
        known = {one["slug"]: one for one in other["choices"]}
        for one in self.choices:
            number = found.get(f"size.{one.slug}", 0)
            if number and one.slug in known:
                value = _amount(known[one.slug]["sizes"][number - 1])
                near = min(range(len(one.sizes)), key=lambda index: abs(math.log(_amount(one.sizes[index]) / value)))
                number = near + 1
            made[f"size.{one.slug}"] = number if one.slug in known else 0
        for index in range(self.layers):
            there = index * other["layers"] // self.layers
            made[f"layer.{index}"] = found.get(f"layer.{there}", 1)
        blocks = 1 + max((int(name.partition(".")[0]) for name in other["pieces"]), default=-1)
        own = 1 + max((int(name.partition(".")[0]) for name in self.pieces), default=-1)
        for name in self.pieces:
            index, _, piece = name.partition(".")
            made[f"piece.{name}"] = found.get(f"piece.{int(index) * blocks // own}.{piece}", 0)
        if self.rates is not None:
            low, high = self.rates
            made["rate"] = min(max(found.get("rate", math.sqrt(low * high)), low), high)
        return made


def _amount(settings: Mapping[str, Any]) -> float:
    """What a size comes to as one number, for telling how far sizes are apart."""
    values = list(settings.values())
    return float(values[0]) if values else 1.0


# Making a space


def make_space(
    entries: list[dict[str, Any]], model: Any, *, layers: bool, rates: tuple[float, float] | None, labelled: bool
) -> Space:
    """The space of a search on a base.

    Args:
        entries: what may be in a configuration: `method`, and if given `settings`, `sizes` (values of the method's
            size, or mappings of hyper-parameters) or, for `full`, `pieces` of the base (of `PIECES`).
        model: the base, its tensors on the meta device.
        layers: whether blocks are chosen.
        rates: lowest and highest learning rate, None where it is not chosen.
        labelled: whether the task brings a new head, which always trains.

    Raises:
        ValueError: for entries that cannot be, and where no size of a method fits the base.
    """
    base = describe(model)
    choices, pieces = [], {}
    for entry in entries:
        if entry.get("pieces"):
            pieces |= pieces_of(base, entry["pieces"])
        else:
            choices.append(_choice(entry, model, base))
    if layers and not base.blocks:
        raise ValueError(f"{type(model).__name__} has no blocks to choose among; search with --no-layers")
    head = next(iter([*base.head_new, *([base.head] if base.head else [])]), None) if labelled else None
    return Space(
        tuple(choices), len(base.blocks) if layers and choices else 0, pieces, rates,
        re.escape(head) if head is not None else None,
    )  # fmt: skip


def _choice(entry: Mapping[str, Any], model: Any, base: Anatomy) -> Choice:
    slug = find(entry["method"]).slug
    settings = AS_PUBLISHED.get(slug, {}) | (entry.get("settings") or {})
    names = size_names(slug)
    given = entry.get("sizes")
    sizes: list[dict[str, Any]]
    if given is not None:
        sizes = [one if isinstance(one, dict) else _sized(slug, settings, names, one) for one in given]
    elif names and names[0] not in settings:
        sizes = [_sized(slug, settings, names, value) for value in ladder(base.hidden_size or 0, names[0])]
    else:
        sizes = [{}]
    fitting, reason = [], "it has none"
    for size in sizes:
        made = make(slug, **settings | size)
        found = size_on(model, made)
        if made.needs_data or "reason" not in found:
            fitting.append((found.get("trainable", 0), size))
        else:
            reason = found["reason"]
    if not fitting:
        raise ValueError(f"search: no size of {slug} fits {type(model).__name__}: {reason}")
    return Choice(slug, settings, tuple(size for _, size in sorted(fitting, key=lambda item: item[0])))


def _sized(slug: str, settings: Mapping[str, Any], names: tuple[str, ...], value: Any) -> dict[str, Any]:
    if not names:
        raise ValueError(f"search: {slug} has no size; write its sizes as mappings of hyper-parameters")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"search: {value!r} is no size of {slug}; write a whole number, or a mapping")
    made = make(slug, **settings)
    first = getattr(made, names[0])
    return {name: value if name == names[0] else max(1, round(value * getattr(made, name) / first)) for name in names}


def ladder(width: int, name: str) -> list[int]:
    """The paper's sizes, floor(width / 2^j) for j = 0 ... 9; for a reduction the powers of two that give them."""
    shifts = range(min(10, max(width, 1).bit_length()))
    if name == "reduction":
        return [1 << shift for shift in shifts]
    return sorted({width >> shift for shift in shifts if width >> shift} or {1, 2, 4, 8, 16, 32})


def pieces_of(base: Anatomy, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Paths of a base's modules by piece, as FairTune masks them: `0.norm`, `0.attention`, `0.mlp`, `1.norm`, ...

    Raises:
        ValueError: for a piece that there is not.
    """
    for name in names:
        if name not in PIECES:
            raise ValueError(f"search: pieces has {name!r}; a base has {', '.join(PIECES)}")
    if not base.blocks:
        raise ValueError(f"{type(base.model).__name__} has no blocks whose pieces could be chosen")
    found: dict[str, tuple[str, ...]] = {}
    for block in base.blocks:
        inside: dict[str, list[str]] = {"block": [block.path]}
        for site in base.sites:
            if site.block != block.index or site.parameter is None:
                continue
            kind = "norm" if site.kind == "norm" else (site.role or "").partition(".")[0].removeprefix("cross_")
            inside.setdefault(kind, []).append(site.path)
        for name in names:
            if paths := tuple(dict.fromkeys(inside.get(name, ()))):
                found[f"{block.index}.{name}"] = paths
    missing = [name for name in names if not any(one.endswith(f".{name}") for one in found)]
    if missing:
        raise ValueError(f"search: the blocks of {type(base.model).__name__} have no {missing[0]}")
    return found
