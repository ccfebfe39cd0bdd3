"""A search, as a person describes it: one YAML file, or a command's options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..core import fields
from ..core.registry import find, make
from ..training import yaml_file
from ..training.recipe import Recipe
from .recipe_keys import FIXED, RECIPE, filled, flat, own_keys, parted, refuse_unknown
from .spec import amount

PUBLISHED = ("pfeiffer", "parallel_adapter", "prefix_tuning", "lora")
"""AutoPEFT's modules, and LoRA."""
MASKED = {"method": "full", "pieces": ["norm", "attention", "mlp"]}
"""FairTune's: three bits a block."""
FAIR_RATES = (1e-5, 1e-3)
INSTEAD = {name: f"{name} is what is looked for; say with methods what it may be" for name in ("method", "settings")}
COSTS = {"params": "kept", "bytes": "stored_bytes", "memory": "peak_memory_bytes", "time": "step_seconds"}
"""What is spent, and the column of a row that says so; `params` are the values in the artifact."""
SAMPLERS = ("gp", "tpe", "random")
"""What may propose a trial; `samplers.py` says how each does."""


@dataclass(kw_only=True, frozen=True)
class Search:
    """A search, as a person describes it. `keys` are those of the recipe that all its runs share.

    Raises:
        ValueError: one line, for what does not exist or cannot be.
    """

    slug: ClassVar[str] = "search"

    title: str | None = fields.text(None, "what the search is called, also in a storage that holds several")
    methods: list[Any] = fields.declared(
        [], "what may be attached: slugs, or mappings with method, settings, sizes, pieces; by default AutoPEFT's "
        "modules and LoRA, with --fair the base's own norms, attentions and feed-forward parts",
        "a list of slugs or mappings", lambda v: isinstance(v, list),
    )  # fmt: skip
    layers: bool = fields.flag(True, "choose the blocks that are changed, too")
    rates: list[float] | None = fields.declared(
        None, "lowest and highest learning rate, when it is to be chosen; with --fair 1e-5 and 1e-3",
        "two learning rates, the lower one first",
        lambda v: v is None or (isinstance(v, list) and len(v) == 2 and 0 < v[0] < v[1]),
    )  # fmt: skip
    metric: str | None = fields.text(
        None, "the figure that decides; by default accuracy, rmse or loss, as the task has it; with --fair the worst "
        "group's",
    )  # fmt: skip
    cost: str = fields.choice("params", (*COSTS, "none"), "what is spent; none searches for the figure alone")
    most: str | None = fields.text(
        None, "most values that may train, such as 100k, or a share of the base's such as 1%"
    )
    fair: str | None = fields.text(
        None, "column of the data that says to which group a row belongs: search for fairness"
    )
    trials: int = fields.positive(60, "configurations that are tried; the paper tries 200")
    startup: int | None = fields.whole(
        None, "of these drawn by chance before anything is modelled; half by default, as in the paper",
        low=1, optional=True,
    )  # fmt: skip
    sampler: str | None = fields.declared(
        None, "what proposes: gp (Gaussian processes with a sparse prior), tpe, random; gp by default, tpe with --fair",
        f"one of {', '.join(SAMPLERS)}, or none", lambda v: v is None or v in SAMPLERS,
    )  # fmt: skip
    fidelity: float = fields.declared(
        0.3, "length of a trial over that of a full run", "a number above 0 and at most 1",
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v <= 1,
    )  # fmt: skip
    prune_after: int = fields.whole(
        8, "finished trials from which on a trial is stopped that does worse midway than half of those that cost no "
        "more; 0 for never", low=0,
    )  # fmt: skip
    checks: int = fields.positive(4, "evaluations within a trial, by which it may be stopped")
    full: int = fields.whole(1, "full runs, with seeds of their own, of each of the best; 0 for none")
    seed: int = fields.whole(0, "fixes what is proposed, and all trials' order of data and initial values")
    keys: dict[str, Any] = fields.mapping("keys of a recipe, for all runs")

    def __post_init__(self) -> None:
        fields.checked(self)
        for name in self.keys:
            _check_key(name, ())
        if self.most is not None:
            self._share_or_count()
        if self.rates is not None and "lr" in self.keys:
            raise ValueError(f"search: lr={self.keys['lr']} and rates={self.rates} are both given; give one")
        self.entries()
        self.recipe({})

    def entries(self) -> list[dict[str, Any]]:
        """What may be attached, as mappings.

        Raises:
            ValueError: for an unknown method, or one that is there twice.
        """
        default: tuple[Any, ...] = (MASKED,) if self.fair else PUBLISHED
        found: list[dict[str, Any]] = []
        for item in self.methods or default:
            entry: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"method": str(item)}
            for key in entry:
                if key not in ("method", "settings", "sizes", "pieces"):
                    raise ValueError(f"search: an entry of methods has {key!r}; it has method, settings, sizes, pieces")
            entry["method"] = find(str(entry.get("method", "full" if "pieces" in entry else ""))).slug
            if "pieces" in entry and (entry["method"] != "full" or not filled(entry["pieces"])):
                raise ValueError("search: pieces is a list of pieces of the base, and goes with method: full")
            if "sizes" in entry and not filled(entry["sizes"]):
                raise ValueError(f"search: sizes of {entry['method']} must be a list, not {entry['sizes']!r}")
            if entry["method"] == "autopeft":
                raise ValueError("search: autopeft is what a search makes; name the methods that it may hold")
            make(entry["method"], **(entry.get("settings") or {}))
            found.append(entry)
        slugs = [entry["method"] for entry in found]
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"search: {max(slugs, key=slugs.count)} is there twice; give its sizes in one entry")
        return found

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest learning rate that are chosen among."""
        if self.rates is not None:
            return float(self.rates[0]), float(self.rates[1])
        return FAIR_RATES if self.fair and not self.methods and "lr" not in self.keys else None

    @property
    def proposing(self) -> str:
        return self.sampler or ("tpe" if self.fair else "gp")

    @property
    def by_chance(self) -> int:
        """Trials that are drawn before anything is modelled."""
        return self.startup if self.startup is not None else max(1, self.trials // 2)

    def largest(self, total: int) -> float:
        """Most values that may train, of a base of `total`."""
        if self.most is None:
            return math.inf
        number, share = self._share_or_count()
        return number * total if share else number

    def _share_or_count(self) -> tuple[float, bool]:
        assert self.most is not None
        if self.most.strip().endswith("%"):
            return amount(self.most.strip()[:-1]) / 100, True
        return amount(self.most), False

    def recipe(self, decided: Mapping[str, Any], **changed: Any) -> Recipe:
        """The recipe of a run."""
        return Recipe.of(self.keys, decided, {"seed": self.seed}, changed)

    def as_dict(self) -> dict[str, Any]:
        """The keys as a YAML file has them."""
        return flat(self)

    @classmethod
    def of(cls, *sources: Mapping[str, Any]) -> Search:
        """A search of several mappings, later ones winning; keys are its own or a recipe's.

        Raises:
            ValueError: for an unknown key, naming the nearest.
        """
        own, keys = parted(cls, sources, lambda name: _check_key(name, own_keys(cls)))
        return cls(**own, keys=keys)

    @classmethod
    def read(cls, path: str | Path, **options: Any) -> Search:
        """A search from a YAML file, with options that win over it.

        Raises:
            OSError: when the file cannot be read.
            ValueError: when it is not a search.
        """
        return yaml_file.read(path, options, cls.of, kind=cls.slug, example="methods")


def _check_key(name: str, others: Sequence[str]) -> None:
    """Refuse what is no key of a recipe, or one that a search sets itself."""
    refuse_unknown("search", name, [key for key in RECIPE if key not in (*FIXED, "settings")], others, INSTEAD)
