"""Methods made equally large: the size hyper-parameter of each, and the value with which it comes to a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.costs import size_on
from ..core.registry import find, make

LADDER = [*range(1, 9), *(base << shift for shift in range(1, 10) for base in (5, 6, 7, 8))]
"""Values that are looked at first; between the nearest two of them the rest."""
NAMES: tuple[tuple[str, ...], ...] = (
    ("init_rank", "target_rank"), ("rank",), ("size",), ("bottleneck",), ("length",), ("n",), ("band",), ("pairs",),
    ("kernel",), ("vectors",), ("blocks",), ("rows",), ("block",), ("reduction",), ("layers",), ("experts",),
)  # fmt: skip
"""Hyper-parameters that make a method larger or smaller, the first one that a method has counts. Those behind the first
keep their ratio to it."""

Measure = Callable[[dict[str, Any]], "float | None"]
"""What settings come to, None where they cannot be."""


@dataclass(frozen=True)
class Fit:
    """Settings that come to a budget.

    Attributes:
        settings: the method's hyper-parameters, the size changed.
        reached: what they come to, None where it is not known.
        note: one sentence for a person.
    """

    settings: dict[str, Any]
    reached: float | None
    note: str


def size_names(slug: str) -> tuple[str, ...]:
    """The hyper-parameters that make a method larger, empty where its size is fixed."""
    cls = find(slug)
    numbers = {item.name for item in dataclasses.fields(cls) if type(item.default) is int and item.default > 0}
    return next((names for names in NAMES if set(names) <= numbers), ())


def fitted(
    slug: str, settings: Mapping[str, Any], budget: float, measure: Measure, *, above: bool = True, tries: int = 24
) -> Fit:
    """The size with which a method comes nearest to a budget.

    Args:
        slug, settings: the method as it would be without a budget.
        budget: what it shall come to.
        measure: gives what settings come to; grows, or falls, with the size.
        above: whether the nearest may be above the budget.
        tries: most calls of `measure`.
    """
    names = size_names(slug)
    if not names:
        reached = measure(dict(settings))
        return Fit(dict(settings), reached, "its size is fixed" if reached is not None else "its size is not known")
    method = make(slug, **settings)
    shares = {name: getattr(method, name) / getattr(method, names[0]) for name in names[1:]}
    known: dict[int, float | None] = {}

    def at(value: int) -> float | None:
        if value not in known:
            sizes = {names[0]: value} | {name: max(1, round(value * share)) for name, share in shares.items()}
            known[value] = measure(dict(settings) | sizes) if len(known) < tries else None
        return known[value]

    start = getattr(method, names[0])
    here = at(start)
    further = next((value for factor in (2, 4) if (value := at(start * factor)) is not None), None)
    nearer = at(max(1, start // 2)) if further is None else None
    grows = True
    if here is not None and further is not None:
        grows = further >= here
    elif here is not None and nearer is not None:
        grows = nearer <= here
    # Bisection on the ladder; a value that cannot be is passed over.
    low, high = 0, len(LADDER) - 1
    while low < high and len(known) < tries:
        middle = (low + high) // 2
        place = next((i for i in range(middle, high) if at(LADDER[i]) is not None), None)
        if place is None:
            high = middle
        elif (known[LADDER[place]] < budget) == grows:  # type: ignore[operator]
            low = place + 1
        else:
            high = middle
    if low > 0 and LADDER[low] - LADDER[low - 1] > 1:
        _between(at, LADDER[low - 1], LADDER[low], budget)
    at(LADDER[low])
    possible = {value: reached for value, reached in known.items() if reached is not None}
    allowed = {value: reached for value, reached in possible.items() if above or reached <= budget}
    if not possible:
        return Fit(dict(settings), None, f"no {names[0]} is possible here")
    if not allowed:
        value = min(possible) if grows else max(possible)
        sized = _sized(settings, names, shares, value)
        return Fit(sized, possible[value], f"the least it can be, with {names[0]} {value}")
    value = min(allowed, key=lambda one: (abs(allowed[one] - budget), one))
    off = abs(allowed[value] - budget) / budget
    note = f"{names[0]} {value}" + (f", {100 * off:.0f} % from the budget" if off > 0.05 else "")
    return Fit(_sized(settings, names, shares, value), allowed[value], note)


def _between(at: Callable[[int], float | None], low: int, high: int, budget: float) -> None:
    """Look at whole numbers between two, where a straight line would meet the budget, and beside it."""
    first, last = at(low), at(high)
    if first is None or last is None or first == last:
        return
    guess = round(low + (budget - first) * (high - low) / (last - first))
    for value in (guess - 1, guess, guess + 1):
        if low < value < high:
            at(value)


def _sized(
    settings: Mapping[str, Any], names: tuple[str, ...], shares: Mapping[str, float], value: int
) -> dict[str, Any]:
    others = {name: max(1, round(value * share)) for name, share in shares.items()}
    return dict(settings) | {names[0]: value} | others


def on_shape(model: Any, slug: str, quantity: str) -> Measure:
    """What settings come to on a model whose tensors are on the meta device.

    Args:
        quantity: "trainable" or "saved_bytes".
    """

    def measure(settings: dict[str, Any]) -> float | None:
        try:
            return size_on(model, make(slug, **settings)).get(quantity)
        except (ValueError, RuntimeError, ArithmeticError):
            return None

    return measure
