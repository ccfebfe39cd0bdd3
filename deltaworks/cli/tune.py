"""`deltaworks tune`: one run, base and data in, adapter and report out."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..training.recipe import Recipe
from . import options

# Steps of the demonstration, which runs when neither base nor data nor a length is given.
DEMONSTRATION = 200


def command(**given: Any) -> None:
    """Fine-tune a base on data with a method. Options win over the recipe; without either, a small demonstration runs.

    Examples: [dim]deltaworks tune --base ./llama --data chats.jsonl --method dora --set rank=16[/] ·
    [dim]deltaworks tune recipe.yaml --steps 500[/] · [dim]deltaworks tune --output runs/a --resume[/]
    """
    from ..training.tune import tune

    as_json, resume, path = given.pop("as_json"), given.pop("resume"), given.pop("recipe")
    keys = options.given(given)
    written = Path(given["output"]) / "recipe.yaml" if given.get("output") else None
    if path is None and resume and written is not None and written.is_file():
        path = written
    if path is None and not {"base", "data", "steps", "epochs"} & set(keys):
        keys["steps"] = DEMONSTRATION
    recipe = Recipe.read(path, **keys) if path is not None else Recipe.of(keys)
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


command.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
    options.file("recipe", "A recipe's YAML file."),
    *options.declared(Recipe),
    options.parameter(
        "resume", bool, typer.Option("--resume", help="go on with the run in --output where it was stopped"), False
    ),
    options.as_json("print the metrics as JSON and nothing else"),
])  # fmt: skip
