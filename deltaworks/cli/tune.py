"""`deltaworks tune`: one run, base and data in, adapter and report out."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.recipe import Recipe

# Steps of the demonstration, which runs when neither base nor data nor a length is given.
DEMONSTRATION = 200
# Said of an option that is typed otherwise than the recipe's key of the same name.
LISTS = {
    "settings": ("--set", "NAME=VALUE", "a hyper-parameter of the method; may be repeated"),
    "columns": ("--column", "MEANING=NAME", "a column by its meaning, such as prompt=question; may be repeated"),
    "also": ("--also", "SITES", "further places whose own parameters are trained and saved; may be repeated"),
}


def command(**given: Any) -> None:
    """Fine-tune a base on data with a method. Options win over the recipe; without either, a small demonstration runs.

    Examples: [dim]deltaworks tune --base ./llama --data chats.jsonl --method dora --set rank=16[/] ·
    [dim]deltaworks tune recipe.yaml --steps 500[/] · [dim]deltaworks tune --output runs/a --resume[/]
    """
    from ..training.tune import tune

    as_json, resume, path = given.pop("as_json"), given.pop("resume"), given.pop("recipe")
    options = {name: value for name, value in given.items() if value not in (None, [], ())}
    for name in ("settings", "columns"):
        if name in options:
            options[name] = pairs(options[name], LISTS[name][0])
    written = Path(given["output"]) / "recipe.yaml" if given.get("output") else None
    if path is None and resume and written is not None and written.is_file():
        path = written
    if path is None and not {"base", "data", "steps", "epochs"} & set(options):
        options["steps"] = DEMONSTRATION
    recipe = Recipe.read(path, **options) if path is not None else Recipe.of(options)
    if as_json:
        result = tune(recipe, resume=resume, progress=_warn(recipe))
        print(json.dumps({"output": str(result.output), **result.metrics}, default=str))
        return
    from .progress import Progress

    with Progress(recipe.complete()) as progress:
        result = tune(recipe, resume=resume, progress=_warn(recipe, progress.hear))
    progress.close(result)


def _warn(recipe: Recipe, hear: Callable[..., None] = lambda event, **figures: None) -> Callable[..., None]:
    """Hear a run, and say in one line, before its base is loaded, when it will not fit."""

    def heard(event: str, **figures: Any) -> None:
        hear(event, **figures)
        if event == "data":
            from ..study.plan import warning

            if said := warning(recipe, figures["prepared"]):
                print(f"deltaworks: {said}", file=sys.stderr)

    return heard


def pairs(items: list[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` items as a mapping."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{option} {item} is not understood; write {option} NAME=VALUE")
        found[name.strip()] = value.strip()
    return found


def _signature() -> inspect.Signature:
    """The command's options: one for each key of a recipe, with its help."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            "recipe",
            keyword,
            default=None,
            annotation=Annotated[Path | None, typer.Argument(help="A recipe's YAML file.")],
        )
    ]
    hints = typing.get_type_hints(Recipe)
    for item in dataclasses.fields(Recipe):
        if item.name in LISTS:
            flag, shown, text = LISTS[item.name]
            kind: Any = list[str] | None
            option = typer.Option(flag, metavar=shown, help=text)
        else:
            kind = kind_of(hints[item.name]) | None
            flag = "--" + item.name.replace("_", "-")
            flag = f"{flag}/--no-{flag[2:]}" if kind == (bool | None) else flag
            option = typer.Option(flag, help=item.metadata["help"] + default_text(item.default), show_default=False)
        parameters.append(inspect.Parameter(item.name, keyword, default=None, annotation=Annotated[kind, option]))
    resume = typer.Option("--resume", help="go on with the run in --output where it was stopped")
    machine = typer.Option("--json", help="print the metrics as JSON and nothing else")
    parameters.append(inspect.Parameter("resume", keyword, default=False, annotation=Annotated[bool, resume]))
    parameters.append(inspect.Parameter("as_json", keyword, default=False, annotation=Annotated[bool, machine]))
    return inspect.Signature(parameters)


def kind_of(hint: Any) -> Any:
    """The type of an option; one that can be a number or a text is typed as text."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else str


def default_text(default: Any) -> str:
    """What an option's help says of its default."""
    return "" if default in (None, False) or default is dataclasses.MISSING else f" [default: {str(default).lower()}]"


command.__signature__ = _signature()  # type: ignore[attr-defined]
