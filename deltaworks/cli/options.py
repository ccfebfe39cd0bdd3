"""Options of commands that are made from what a dataclass declares: one for each key, with its help."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..study.recipe_keys import FIXED

SEVERAL = list[str] | None
"""The type of an option that may be repeated."""
LISTS = {
    "settings": ("--set", "NAME=VALUE", "a hyper-parameter of the method; may be repeated"),
    "columns": ("--column", "MEANING=NAME", "a column by its meaning, such as prompt=question; may be repeated"),
    "also": ("--also", "SITES", "further places whose own parameters are trained and saved; may be repeated"),
}
"""Said of an option that is typed otherwise than the recipe's key of the same name."""
NOT_FOR_ALL = (*FIXED, "settings", "also", "save_every", "keep")
"""Keys of a recipe that cannot be the same for all the runs of a study or a search."""


def parameter(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    """One option or argument of a command."""
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def file(name: str, help: str) -> inspect.Parameter:
    """The argument that names a YAML file."""
    return parameter(name, Path | None, typer.Argument(help=help))


def declared(
    cls: type, leaving: Collection[str] = (), typed: Mapping[str, tuple[Any, str | None]] | None = None
) -> Iterator[inspect.Parameter]:
    """An option for each key that `cls` declares.

    Arguments:
        leaving: keys that are no options.
        typed: the type of an option that is typed otherwise than its key, and how its value is shown.
    """
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.name in leaving:
            continue
        flag, help = "--" + item.name.replace("_", "-"), item.metadata["help"]
        if item.name in LISTS:
            flag, shown, help = LISTS[item.name]
            yield parameter(item.name, SEVERAL, typer.Option(flag, metavar=shown, help=help))
        elif typed and item.name in typed:
            kind, shown = typed[item.name]
            yield parameter(item.name, kind, typer.Option(flag, metavar=shown, help=help, show_default=False))
        else:
            kind = _kind(hints[item.name]) | None
            flag = f"{flag}/--no-{flag[2:]}" if kind == (bool | None) else flag
            yield parameter(item.name, kind, typer.Option(flag, help=help + _default(item.default), show_default=False))


def running(folder: str) -> list[inspect.Parameter]:
    """The options of a command that makes many runs; `folder` is the help of its --output."""
    return [
        parameter("jobs", int, typer.Option(help="runs side by side on this machine"), 1),
        parameter(
            "ray",
            str | None,
            typer.Option(help="address of a Ray cluster to run on: auto, HOST:PORT, or local", metavar="ADDRESS"),
        ),
        parameter(
            "cache",
            str | None,
            typer.Option(help="folder of runs that are known already [default: ~/.cache/deltaworks/trials]"),
        ),
        parameter("output", str | None, typer.Option(help=folder)),
        as_json("print the results as JSON and nothing else"),
    ]


def as_json(help: str) -> inspect.Parameter:
    """The option `--json`."""
    return parameter("as_json", bool, typer.Option("--json", help=help), False)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were typed; `NAME=VALUE` items as mappings.

    Raises:
        ValueError: for an item that is none.
    """
    typed = {name: value for name, value in values.items() if value not in (None, [], ())}
    for name in ("settings", "columns"):
        if name in typed:
            typed[name] = pairs(typed[name], LISTS[name][0])
    return typed


def pairs(items: list[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` items as a mapping.

    Raises:
        ValueError: for an item that is none.
    """
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{option} {item} is not understood; write {option} NAME=VALUE")
        found[name.strip()] = value.strip()
    return found


def listed(items: list[str]) -> list[str]:
    """The names in the values of an option that may be repeated, with commas or spaces between them."""
    return " ".join(items).replace(",", " ").split()


def _kind(hint: Any) -> Any:
    """The type of an option; one that can be a number or a text is typed as text."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else str


def _default(default: Any) -> str:
    """What an option's help says of its default."""
    return "" if default in (None, False) or default is dataclasses.MISSING else f" [default: {str(default).lower()}]"
