"""Methods that go over another one: they change how that acts or learns, and are that method in all else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ..model.anatomy import Anatomy
from ..model.weights import Weight
from . import fields
from .method import LINEAR, Batches, Method, Placed, WeightMethod
from .part import Shared
from .registry import find, make
from .rule import Rule


def _slug(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _places(value: Any) -> bool:
    return value is None or fields.sites(LINEAR).metadata["check"](value) is None


@dataclass(kw_only=True, frozen=True)
class Over(WeightMethod):
    """Base of methods over another one; hands on what it does not change.

    A method that is given itself is kept by its slug and the hyper-parameters that are not its defaults, so that
    recipes and files hold plain values. What is true of that method is true of this; the class says what is true over
    the default one. An override's `inner` takes the place of the whole `inner`.

    Class attributes:
        ours: hyper-parameters that are given here and not in `inner`.
    """

    everywhere = ("over",)
    ours: ClassVar[tuple[str, ...]] = ("on", "overrides")

    on: Any = fields.declared(None, "where it acts; none for the other method's own places", "places or none", _places)
    over: Any = fields.declared("lora", "the other method, or its slug", "a method or its slug", _slug)
    inner: dict[str, Any] = fields.mapping("hyper-parameters of that method")

    def __post_init__(self) -> None:
        if isinstance(self.over, Method):
            self._name(self.over)
        elif _slug(self.over):
            object.__setattr__(self, "over", find(self.over).slug)
        super().__post_init__()
        for name in self.ours:
            if name in self.inner:
                raise ValueError(f"{self.slug}: inner has {name}={self.inner[name]!r}; give {self.slug} itself {name}=")
        under = self.under
        for name in ("mergeable", "needs_data", "exact_at_start", "exact_gradient", "refuses"):
            object.__setattr__(self, name, getattr(under, name))
        if self.over != type(self).over:
            object.__setattr__(self, "default_lr", under.default_lr)

    def _name(self, given: Method) -> None:
        if self.inner:
            raise ValueError(
                f"{self.slug}: inner={self.inner!r} beside over={given!r}; give that its hyper-parameters"
            )
        own = given.changed()
        if self.on is None:
            object.__setattr__(self, "on", own.pop("on", None))
        object.__setattr__(self, "over", given.slug)
        object.__setattr__(self, "inner", own)

    def given(self) -> dict[str, Any]:
        """The hyper-parameters that the other method is made with."""
        return self.inner

    @functools.cached_property
    def under(self) -> Method:
        """The other method, with other hyper-parameters where overrides of ours say so."""
        plain = make(self.over, **self.given(), **({} if self.on is None else {"on": self.on}))
        own = {pattern: dataclasses.replace(self, overrides={}, **other) for pattern, other in self.overrides.items()}
        there = {pattern: here.under.changed(plain) for pattern, here in own.items()}
        return dataclasses.replace(plain, overrides=there) if any(there.values()) else plain

    def measure(self, base: Anatomy, batches: Batches) -> Any:
        return self.under.measure(base, batches)

    def assumed(self, base: Anatomy) -> Any:
        return self.under.assumed(base)

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        return self.under.shared(base)

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        return self.under.parts(base, shared, measured)

    def rules(self) -> list[Rule]:
        return self.under.rules()

    def group(self, name: str) -> dict[str, float]:
        return self.under.group(name)

    def group_of(self, name: str) -> dict[str, float]:
        return self.under.group_of(name)

    def group_at(self, name: str, kind: str) -> dict[str, float]:
        return self.under.group_at(name, kind)

    def count(self, weight: Weight) -> int:
        under = self.under
        assert isinstance(under, WeightMethod)
        return under.count(weight)

    def made_of(self) -> list[Method]:
        return [self.under]
