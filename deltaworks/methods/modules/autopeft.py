"""AutoPEFT: automatic configuration search for parameter-efficient fine-tuning (Zhou et al. 2024, arXiv:2301.12132).

What the search chooses: several methods at once, each of one size over all chosen blocks,
    y = FFN(x) + 4 U_p relu(D_p x) (parallel),   h + U_s relu(D_s h) (serial),   attention over [P_k; K], [P_v; V],
and a bit for every block. Any other methods stand together in the same way. In code (cambridgeltl/autopeft) the serial
adapter is `pfeiffer`, sizes are floor(width / 2^j) and one rate trains all; so it is here, with each method's own
factors on the rate. `deltaworks search` finds the configuration, the defaults are of the paper's kind: all three.
Use it where one method alone does not get there at the size that can be paid.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Batches, Method, Placed
from ...core.part import Shared
from ...core.registry import find, make, method
from ...core.rule import Rule
from ...core.several import MARK, Within, owner
from ...model.anatomy import Anatomy

DEFAULT = {"pfeiffer": {"reduction": 64}, "parallel_adapter": {"size": 8}, "prefix_tuning": {"length": 4}}


def _layers(value: Any) -> str | None:
    good = value is None or (
        isinstance(value, (list, tuple)) and len(value) > 0
        and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value)
    )  # fmt: skip
    return None if good else "a list of block numbers, or none"


def _together(value: Any) -> str | None:
    good = isinstance(value, dict) and value and all(isinstance(one, (dict, type(None))) for one in value.values())
    return None if good else "a mapping of methods to their hyper-parameters, such as {lora: {rank: 4}, ia3: {}}"


@method("autopeft", paper="2301.12132", family="modules")
class AutoPEFT(Method):
    """Several methods on some blocks; trains what each of them trains there."""

    overridable = False
    mergeable = False
    exact_at_start = False
    default_lr = 1e-4
    refuses = ("mamba",)

    methods: dict[str, dict[str, Any]] = fields.field(
        DEFAULT, "what stands together: methods with their hyper-parameters", _together, "a mapping"
    )
    layers: Any = fields.field(
        None, "numbers of the blocks that are changed; all by default", _layers, "a list of block numbers, or none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "autopeft" in {find(slug).slug for slug in self.methods}:
            raise ValueError("autopeft: methods has autopeft itself; name the methods that stand together")
        members = self.members
        # What is true of all is true of the whole; the class says what is true of any such configuration.
        object.__setattr__(self, "mergeable", all(one.mergeable for one in members.values()))
        object.__setattr__(self, "needs_data", any(one.needs_data for one in members.values()))

    @functools.cached_property
    def members(self) -> dict[str, Method]:
        """The methods, by slug.

        Raises:
            ValueError: for a method or a hyper-parameter that does not exist.
        """
        return {find(slug).slug: make(slug, **(settings or {})) for slug, settings in self.methods.items()}

    def made_of(self) -> list[Method]:
        return list(self.members.values())

    def measure(self, base: Anatomy, batches: Batches) -> dict[str, Any]:
        seen = list(batches)
        return {slug: one.measure(base, seen) for slug, one in self.members.items() if one.needs_data}

    def assumed(self, base: Anatomy) -> dict[str, Any]:
        return {slug: one.assumed(base) for slug, one in self.members.items() if one.needs_data}

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        lent: dict[str, Shared] = {}
        for slug, one in self.members.items():
            for name, module in one.shared(base).items():
                if name in lent:
                    raise ValueError(f"autopeft: {slug} and a method before it both share {name!r} among their parts")
                module.lent_to = slug  # type: ignore[assignment]
                lent[name] = module
        return lent

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        wanted = None if self.layers is None else set(self.layers)
        there = {block.index for block in base.blocks}
        if wanted is not None and not wanted <= there:
            raise ValueError(f"autopeft: there is no block {max(wanted - there)}; the model has {len(there)}")
        for slug, one in self.members.items():
            found = 0
            lent = {name: module for name, module in shared.items() if module.lent_to == slug}
            for item in one.parts(base, lent, (measured or {}).get(slug)):
                if wanted is None or item.site.block is None or item.site.block in wanted:
                    found += 1
                    yield dataclasses.replace(item, label=f"{slug}{MARK}{item.label}")
            if not found:
                where = f" in blocks {sorted(wanted)}" if wanted is not None else ""
                raise ValueError(f"autopeft: {slug} finds nothing to change{where}; leave it out")

    def rules(self) -> list[Rule]:
        return [Within(rule, slug, one) for slug, one in self.members.items() for rule in one.rules()]

    def group_of(self, name: str) -> dict[str, float]:
        one = self.members.get(owner(name) or "")
        return one.group_of(name) if one is not None else {}

    def group_at(self, name: str, kind: str) -> dict[str, float]:
        one = self.members.get(owner(name) or "")
        return one.group_at(name, kind) if one is not None else {}
