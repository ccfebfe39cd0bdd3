"""Keys of a file that has its own and, beside them, those of a recipe for all its runs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..training.recipe import Recipe

RECIPE = tuple(item.name for item in dataclasses.fields(Recipe))
FIXED = ("method", "seed", "output")
"""Keys of a recipe that a study or a search sets itself."""


def filled(value: Any) -> bool:
    """Whether a value is a list with something in it."""
    return isinstance(value, list) and len(value) > 0


def own_keys(cls: type) -> list[str]:
    """The names that a description declares beside `keys`, which holds the recipe's."""
    return [item.name for item in dataclasses.fields(cls) if item.name != "keys"]


def parted(
    cls: type, sources: Sequence[Mapping[str, Any]], check: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Several mappings, later ones winning, as the keys of `cls` and those of a recipe, which `check` may refuse."""
    names = own_keys(cls)
    mine: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    for source in sources:
        given = {str(name).replace("-", "_"): value for name, value in source.items()}
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if given.get(one) is not None:
                keys.pop(other, None)
        for name, value in given.items():
            if name not in names:
                check(name)
            (mine if name in names else keys)[name] = value
    return mine, keys


def refuse_unknown(
    kind: str, name: Any, keys: Sequence[str], others: Iterable[str], instead: Mapping[str, str]
) -> None:
    """Refuse a key that is none of a recipe's `keys`.

    Arguments:
        kind: what has the key, as errors call it.
        others: further names that would be right there.
        instead: what to say of keys that exist but do not belong there.

    Raises:
        ValueError: what to write instead, or the nearest name, or all of them.
    """
    if name in keys:
        return
    if name in instead:
        raise ValueError(f"{kind}: {instead[name]}")
    near = difflib.get_close_matches(str(name), [*keys, *others], n=1)
    hint = f"did you mean {near[0]}?" if near else f"a {kind} has {', '.join([*others, *keys])}"
    raise ValueError(f"{kind} has no key {name!r}; {hint}")


def flat(description: Any) -> dict[str, Any]:
    """A description's keys as a YAML file has them."""
    return {name: getattr(description, name) for name in own_keys(type(description))} | description.keys
