"""`deltaworks compare`: several methods on the same work, with repeats, intervals and pictures."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from ..study.recipe_keys import FIXED
from ..study.spec import Study
from ..training.recipe import Recipe
from .tune import LISTS, default_text, kind_of, pairs

# Given by the study's file only: what a line of options cannot say well.
WRITTEN = ("axes", "expected", "found", "keys")
NOT_HERE = (*FIXED, "settings", "also", "save_every", "keep")
# Demonstration, when neither base nor data nor a study is given.
DEMONSTRATION = {"methods": ["lora", "ia3", "bitfit"], "steps": 40, "limit": 400, "max_length": 128, "samples": 0}


def command(**given: Any) -> None:
    """Compare methods on the same base, data and budget; what was run before is not run again.

    Examples: [dim]deltaworks compare --base ./llama --data chats.jsonl --methods lora,dora,ia3 --steps 200[/] ·
    [dim]deltaworks compare --methods lowrank --budget params=100k --seeds 5 --jobs 4[/] ·
    [dim]deltaworks compare studies/nursery.yaml --output runs/nursery[/]
    """
    from ..study.compare import compare
    from ..study.engine import Runner
    from ..study.pages import save
    from ..study.spec import Study
    from ..study.summary import summarise

    as_json, path, output = given.pop("as_json"), given.pop("study"), given.pop("output")
    jobs, ray, cache = given.pop("jobs"), given.pop("ray"), given.pop("cache")
    options = {name: value for name, value in given.items() if value not in (None, [], ())}
    for name in ("methods", "baselines", "rate_axes"):
        if name in options:
            options[name] = " ".join(options[name]).replace(",", " ").split()
            options[name] = [] if options[name] == ["none"] else options[name]
    for name in ("seeds", "rates"):
        if name in options:
            options[name] = _numbers(name, options[name])
    if "columns" in options:
        options["columns"] = pairs(options["columns"], LISTS["columns"][0])
    if path is None and not {"base", "data", "steps", "epochs"} & set(options):
        options = DEMONSTRATION | options
    study = Study.read(path, **options) if path is not None else Study.of(options)
    folder = Path(output) if output else Path("runs") / (path.stem if path is not None else "compare")
    if as_json:
        with Runner(cache, jobs, ray) as runner:
            found = compare(study, runner)
        save(found, folder)
        print(json.dumps({"output": str(folder), "run": found.run, "cached": found.cached, **summarise(found)}))
        return
    from .comparing import Progress

    with Progress() as progress, Runner(cache, jobs, ray) as runner:
        found = compare(study, runner, tell=progress.hear)
    report = save(found, folder)
    progress.close(found, report)


def _numbers(name: str, text: str) -> Any:
    """`3`, or `1e-3,1e-2` as a list.

    Raises:
        ValueError: for what is no number.
    """
    try:
        if "," in text:
            return [(int if name == "seeds" else float)(one) for one in text.split(",") if one.strip()]
        return int(text) if name == "seeds" or text.isdigit() else [float(text)]
    except ValueError:
        raise ValueError(f"--{name} {text} is not understood; write a number, or several with commas") from None


def _signature() -> inspect.Signature:
    """The command's options: a study's keys and a recipe's, each with its help."""
    keyword = inspect.Parameter.KEYWORD_ONLY

    def one(name: str, default: Any, kind: Any, option: Any) -> inspect.Parameter:
        return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])

    several = list[str] | None
    parameters = [one("study", None, Path | None, typer.Argument(help="A study's YAML file."))]
    for item in dataclasses.fields(Study):
        if item.name in WRITTEN:
            continue
        listed = item.name in ("methods", "baselines", "rate_axes")
        kind = (
            several if listed else (str if item.name in ("seeds", "rates") else kind_of(_hint(Study, item.name))) | None
        )
        option = typer.Option(
            "--" + item.name.replace("_", "-"), help=item.metadata["help"], show_default=False,
            metavar="A,B,..." if listed else None,
        )  # fmt: skip
        parameters.append(one(item.name, None, kind, option))
    for item in dataclasses.fields(Recipe):
        if item.name in NOT_HERE:
            continue
        flag = "--" + item.name.replace("_", "-")
        if item.name in LISTS:
            flag, meta, text = LISTS[item.name]
            parameters.append(one(item.name, None, several, typer.Option(flag, metavar=meta, help=text)))
            continue
        kind = kind_of(_hint(Recipe, item.name)) | None
        flag = f"{flag}/--no-{flag[2:]}" if kind == (bool | None) else flag
        option = typer.Option(flag, help=item.metadata["help"] + default_text(item.default), show_default=False)
        parameters.append(one(item.name, None, kind, option))
    jobs = typer.Option(help="runs side by side on this machine")
    ray = typer.Option(help="address of a Ray cluster to run on: auto, HOST:PORT, or local", metavar="ADDRESS")
    cache = typer.Option(help="folder of runs that are known already [default: ~/.cache/deltaworks/trials]")
    folder = typer.Option(help="folder of the results [default: runs/STUDY]")
    machine = typer.Option("--json", help="print the results as JSON and nothing else")
    return inspect.Signature([
        *parameters,
        one("jobs", 1, int, jobs),
        one("ray", None, str | None, ray),
        one("cache", None, str | None, cache),
        one("output", None, str | None, folder),
        one("as_json", False, bool, machine),
    ])  # fmt: skip


def _hint(cls: type, name: str) -> Any:
    return typing.get_type_hints(cls)[name]


command.__signature__ = _signature()  # type: ignore[attr-defined]
