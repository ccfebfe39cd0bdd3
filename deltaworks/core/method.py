"""A method: which parts it puts at which sites, with which rules and parameter groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import regex
from torch import nn

from ..model.anatomy import Anatomy, Site
from ..model.names import ends
from ..model.weights import Weight
from . import fields
from .experts import PerExpert
from .init import zeros
from .part import Delta, Part, Shared
from .rule import Rule

LINEAR = "all"
Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Placed:
    """A part and the site it is for; `label` is its name among the parts of one module."""

    site: Site
    part: Part
    label: str


@dataclass(kw_only=True, frozen=True)
class Method:
    """Base of all methods: a dataclass of hyper-parameters that plans its parts.

    Class attributes:
        mergeable: the change can be folded into the base's parameters.
        needs_data: `measure` must run before `parts`.
        exact_at_start: the output right after attaching is the base's.
        exact_gradient: the gradient is the derivative of the loss (not so where the paper detaches something).
        default_lr: a learning rate to begin with, the paper's or the field's usual one; an instance may have its own.
        refuses: kinds of bases it cannot work on, as the tests name them; everything else it must.
        overridable: `overrides` mean something to it.
        everywhere: hyper-parameters that its rules and shared tensors read, so that no override may change them.
        ordered: pairs of hyper-parameters of which the first may not be above the second, each with the reason.
        only: hyper-parameters that mean something only where another one has one of some values.

    Attributes:
        overrides: other hyper-parameters at some places: regular expression over module names -> settings. What PEFT
            calls rank and alpha patterns is `{"layers.0.*q_proj": {"rank": 16, "alpha": 32}}`.
    """

    slug: ClassVar[str]
    paper: ClassVar[str]
    family: ClassVar[str]
    mergeable: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    exact_at_start: ClassVar[bool] = True
    exact_gradient: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    refuses: ClassVar[tuple[str, ...]] = ()
    overridable: ClassVar[bool] = False
    everywhere: ClassVar[tuple[str, ...]] = ()
    ordered: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    only: ClassVar[tuple[tuple[str, str, tuple[Any, ...]], ...]] = ()

    overrides: dict[str, dict[str, Any]] = fields.mapping(
        "other hyper-parameters where a module name matches a pattern"
    )

    def __post_init__(self) -> None:
        fields.checked(self)
        for low, high, why in self.ordered:
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{self.slug}: {low}={getattr(self, low)} is above {high}={getattr(self, high)}; {why}"
                )
        for name, other, values in self.only:
            given, found = getattr(self, name), getattr(self, other)
            if found not in values and given != getattr(type(self), name):
                shown = f"{given:g}" if isinstance(given, float) else given
                wanted = " or ".join(map(repr, values))
                raise ValueError(f"{self.slug}: {name}={shown} is for {other}={wanted}, not {found}")
        if self.overrides and not self.overridable:
            raise ValueError(
                f"{self.slug} is the same at all its places; it takes no overrides, {self.overrides!r} was given"
            )
        for pattern, settings in self.overrides.items():
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"{self.slug}: overrides has {pattern!r}, not a regular expression: {error}") from None
            if not isinstance(settings, dict):
                raise ValueError(
                    f"{self.slug}: overrides[{pattern!r}] must be a mapping of hyper-parameters, not {settings!r}"
                )
            fixed = [name for name in settings if name in (*self.everywhere, "on", "overrides")]
            if fixed:
                raise ValueError(
                    f"{self.slug}: {fixed[0]} is the same at all places; overrides[{pattern!r}] cannot change it"
                )
            dataclasses.replace(self, overrides={}, **fields.parse(type(self), settings))

    def at(self, path: str) -> Method:
        """This method as it is at one module: the first override whose pattern matches the end of the name applies."""
        for pattern, settings in self.overrides.items():
            if ends(pattern, path):
                return dataclasses.replace(self, overrides={}, **settings)
        return self

    def measure(self, base: Anatomy, batches: Batches) -> Any:
        """For methods that need data: what they measure before attaching, given to `parts`."""
        return None

    def assumed(self, base: Anatomy) -> Any:
        """What `measure` might give, right in its shapes only: for sizes that are wanted before there is any data.

        Raises:
            ValueError: where a method that needs data cannot say.
        """
        raise ValueError(f"{self.slug}: depends on the data")

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        """Tensors that several parts borrow, by the name of the constructor argument that receives them."""
        return {}

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        """The parts, each with its site."""
        raise NotImplementedError

    def rules(self) -> list[Rule]:
        """The rules that run while this method trains."""
        return []

    def group(self, name: str) -> dict[str, float]:
        """Optimizer settings of one tensor of a part: `lr_scale` (a factor), `weight_decay`; empty for the run's own.

        `name` is the tensor's name within its part, such as `a`.
        """
        return {}

    def group_of(self, name: str) -> dict[str, float]:
        """The same by a tensor's full name, `<module path>.<label>.<tensor>`: with the overrides that hold there."""
        places = name.rsplit(".", 2)
        return self.at(places[0]).group(places[-1]) if self.overrides else self.group(places[-1])

    def group_at(self, name: str, kind: str) -> dict[str, float]:
        """The same for a tensor at a site of some kind (`Site.kind`; empty where several share it); may name an `lr` of
        its own, not the run's."""
        return self.group_of(name)

    def made_of(self) -> list[Method]:
        """The methods that this one is made of, if it is."""
        return []

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters as plain values."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def changed(self, usual: Method | None = None) -> dict[str, Any]:
        """The hyper-parameters that are not those of `usual`, by default the method's defaults."""
        known = (type(self)() if usual is None else usual).settings()
        return {name: value for name, value in self.settings().items() if value != known[name]}


@dataclass(kw_only=True, frozen=True)
class WeightMethod(Method):
    """A method that puts one delta at each chosen weight."""

    overridable = True

    on: Any = fields.sites(LINEAR)

    def delta(self, weight: Weight, **given: Any) -> Delta | None:
        """The delta of one weight (`out x in`; fused experts and fused projections are dealt with by the core).

        `given` holds what `shared` made, and `measured`, what `measure` found for this site, for methods that need
        data. None leaves the site as it is.
        """
        raise NotImplementedError

    def count(self, weight: Weight) -> int:
        """The paper's formula for the number of trained values at one `out x in` weight (shared ones left out)."""
        raise NotImplementedError

    def assumed(self, base: Anatomy) -> dict[Site, Any]:
        """Something as large as each weight, such as a gradient: what most of these methods measure."""
        return {site: zeros(*weight_at(base.model, site).shape) for site in base.select(self.on, what="weight")}

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        for site in base.select(self.on, what="weight"):
            weight = weight_at(base.model, site)
            given: dict[str, Any] = dict(shared)
            if self.needs_data:
                given["measured"] = measured[site]
            here = self.at(site.path)
            if not isinstance(here, WeightMethod):
                raise TypeError("an override cannot change the kind of a method")
            if weight.experts is None:
                delta = here.delta(weight, **given)
            else:
                made = [here.delta(one, **given) for one in experts_of(weight)]
                delta = PerExpert([one for one in made if one is not None]) if made[0] is not None else None
            if delta is not None:
                yield Placed(site, delta, label(site))


def weight_at(model: nn.Module, site: Site) -> Weight:
    """The weight of a site."""
    rows = None if site.rows is None else list(site.rows)
    return Weight(model.get_submodule(site.path), site.parameter or "weight", rows, site.path)


def label(site: Site) -> str:
    """The name of a part among those of its module: the parameter, and the part of a fused one."""
    parameter = site.parameter or "call"
    return parameter if site.part is None else f"{parameter}_{site.part}"


def experts_of(weight: Weight) -> Iterator[Weight]:
    """Each expert's matrix of a fused parameter, as a weight of its own."""
    for index in range(weight.experts or 0):
        yield _Expert(weight, index)


class _Expert(Weight):
    """One matrix of a fused expert parameter."""

    def __init__(self, whole: Weight, index: int) -> None:
        super().__init__(whole.layer, whole.parameter, whole.rows, whole.path)
        self.whole, self.number = whole, index

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape[1:]

    @property
    def experts(self) -> None:
        return None

    def matrix(self):
        return self.whole.matrix()[self.number]
