"""Hyper-parameters carry their meaning, unit and range where they are declared; nowhere else are they checked.

A method is a dataclass. Each field is declared by one of the functions here, which store a check and a sentence in the
field's metadata; `checked` runs every check when the method is made, and `parse` reads values typed on a command line.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

Check = Callable[[Any], str | None]


def field(default: Any, help: str, check: Check, wanted: str) -> Any:
    """A declared hyper-parameter: `check(value)` returns what would be right, or None when the value is."""
    metadata = {"help": help, "check": check, "wanted": wanted}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positive(default: int | None, help: str, *, optional: bool = False) -> Any:
    """A whole number of at least 1 (or None, where `optional`)."""
    return whole(default, help, low=1, optional=optional)


def whole(default: int | None, help: str, *, low: int = 0, high: int | None = None, optional: bool = False) -> Any:
    """A whole number in `low ... high`."""
    wanted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    wanted += " or none" if optional or default is None else ""

    def check(value: Any) -> str | None:
        if value is None and (optional or default is None):
            return None
        good = (
            isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
        )
        return None if good else wanted

    return field(default, help, check, wanted)


def number(
    default: float | None, help: str, *, low: float = -math.inf, high: float = math.inf, above: float | None = None
) -> Any:
    """A finite real number in `low ... high`, or greater than `above`."""
    wanted = "a number" if above is None else f"a number above {above:g}"
    if math.isfinite(low):
        wanted += f" of at least {low:g}"
    if math.isfinite(high):
        wanted += f" of at most {high:g}"
    wanted += " or none" if default is None else ""

    def check(value: Any) -> str | None:
        if value is None and default is None:
            return None
        good = value is not None and _real(value) and low <= value <= high and (above is None or value > above)
        return None if good else wanted

    return field(default, help, check, wanted)


def fraction(default: float, help: str) -> Any:
    """A share: at least 0 and below 1."""
    wanted = "a number of at least 0 and below 1"
    return field(default, help, lambda v: None if _real(v) and 0 <= v < 1 else wanted, wanted)


def flag(default: bool, help: str) -> Any:
    """True or false."""
    return field(default, help, lambda v: None if isinstance(v, bool) else "true or false", "true or false")


def choice(default: Any, options: Sequence[Any], help: str) -> Any:
    """One of `options`."""
    wanted = "one of " + ", ".join(str(option) for option in options)
    return field(
        default, help, lambda v: None if any(v == o and type(v) is type(o) for o in options) else wanted, wanted
    )


def sites(
    default: Any, help: str = "where it acts: roles, regular expressions, module types, or a list of these"
) -> Any:
    """What `on=` accepts; whether it matches anything is known only once there is a model."""
    wanted = "a role, a regular expression, a module type, or a list of these"

    def check(value: Any) -> str | None:
        values = value if isinstance(value, (list, tuple)) else [value]
        good = values and all(isinstance(v, (str, type)) and v != "" for v in values)
        return None if good else wanted

    return field(default, help, check, wanted)


def mapping(help: str) -> Any:
    """A dictionary with text keys, empty by default."""
    wanted = "a mapping with text keys"

    def check(value: Any) -> str | None:
        return None if isinstance(value, dict) and all(isinstance(k, str) for k in value) else wanted

    return field({}, help, check, wanted)


def declared(default: Any, help: str, wanted: str, good: Callable[[Any], bool]) -> Any:
    """A value of which `good` says whether it may be, and `wanted` what would be right."""
    return field(default, help, lambda value: None if good(value) else wanted, wanted)


def text(default: str | None, help: str) -> Any:
    """A text that is not empty; or None, where that is the default."""
    wanted = "a text" if default is not None else "a text or none"
    return declared(
        default, help, wanted, lambda v: (v is None and default is None) or (isinstance(v, str) and bool(v))
    )


def token_ids(help: str) -> Any:
    """A list of token ids, or of lists of them; empty by default."""
    wanted = "a list of token ids"

    def good(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(
            (isinstance(v, int) and not isinstance(v, bool) and v >= 0) or (v != [] and good(v)) for v in value
        )

    return field([], help, lambda value: None if good(value) else wanted, wanted)


def checked(instance: Any) -> None:
    """Run every declared check of a dataclass instance.

    Raises:
        ValueError: one line naming the method, the hyper-parameter, the value given and what would be right.
    """
    for item in dataclasses.fields(instance):
        value, check = getattr(instance, item.name), item.metadata.get("check")
        # A whole number is a fine real number; storing it as one keeps saved files and hashes equal.
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(item.default, float):
            value = float(value)
            object.__setattr__(instance, item.name, value)
        wanted = check(value) if check else None
        if wanted:
            owner = getattr(type(instance), "slug", type(instance).__name__)
            raise ValueError(f"{owner}: {item.name}={value!r} is not allowed; it must be {wanted}")


def parse(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as typed (`rank=16`, `on=attention,mlp`) as the values that `cls` declares.

    Raises:
        ValueError: for a name that `cls` does not have, listing those it has.
    """
    known = {item.name: item for item in dataclasses.fields(cls) if item.init}
    slug = getattr(cls, "slug", cls.__name__)
    parsed: dict[str, Any] = {}
    for name, value in settings.items():
        name = name.replace("-", "_")
        if name not in known:
            raise ValueError(f"{slug} has no hyper-parameter {name!r}; it has {', '.join(known)}")
        parsed[name] = _value(value) if isinstance(value, str) and name != "on" else value
        if name == "on" and isinstance(value, str):
            parsed[name] = _value(value) if value.startswith("[") else value
        check = known[name].metadata.get("check")
        # For some, `none` is the word for one of their kinds.
        if parsed[name] is None and check and check(None) is not None and check(value) is None:
            parsed[name] = value
    return parsed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"none": None, "None": None, "True": True, "False": False}.get(text, text)
