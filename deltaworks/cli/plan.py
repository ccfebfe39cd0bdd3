"""`deltaworks plan`: what a run would need and take, before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

SPLIT = ("weights", "gradients", "optimizer", "activations", "logits")
WIDTH = 118  # of the table; a narrower terminal breaks its lines


def command(
    base: Annotated[str, typer.Option(help="The base: a folder, a name on the Hub, or nursery:NAME.")],
    data: Annotated[str | None, typer.Option(help="The data, for how long batches really are.")] = None,
    task: Annotated[str | None, typer.Option(help="What is learned; by default what data or base are for.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="A method, or all; may be repeated. By default one of every kind.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[METHOD]...", help="Further methods.")] = None,
    memory: Annotated[str | None, typer.Option(help="What the run may take, as 24GiB [default: what is free].")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in one forward pass.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Longest example, in tokens [default: 512].")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base; by default as it is stored.")] = None,
    quantize: Annotated[str | None, typer.Option(help="How the base is stored: int8, int4, nf4.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the backward pass.")] = False,
    packing: Annotated[bool, typer.Option(help="Several examples in one sequence.")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, sgd or adafactor.")] = "adamw",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter, where a method has it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict memory, sizes and time of methods on a base, without loading its weights, and what to change if it is
    too much.

    Examples: [dim]deltaworks plan --base ./llama --memory 24GiB[/] ·
    [dim]deltaworks plan --base ./llama --data chats.jsonl --methods lora dora --batch-size 4[/] ·
    [dim]deltaworks plan --base nursery:decoder --methods all --json[/]
    """
    from ..study.memory import parse
    from ..study.plan import plan
    from ..training.recipe import Recipe
    from ..training.tune import read_data

    options: dict[str, Any] = {
        "base": base, "data": data, "task": task, "batch_size": batch_size, "max_length": max_length, "dtype": dtype,
        "quantize": quantize, "checkpointing": checkpointing or None, "packing": packing or None,
        "optimizer": optimizer, "device": device,
    }  # fmt: skip
    recipe = Recipe.of({name: value for name, value in options.items() if value is not None})
    chosen = _chosen([*(methods or []), *(more or [])], settings or [])
    room = None if memory is None else parse(memory)
    prepared = read_data(recipe)[3] if data is not None else None
    if as_json:
        made = plan(recipe, chosen, memory=room, prepared=prepared)
        print(json.dumps(_record(made), indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    with console.status("") as status:
        made = plan(recipe, chosen, memory=room, prepared=prepared, tell=lambda slug: status.update(slug))
    _show(made, console)


def _chosen(names: list[str], settings: list[str]) -> list[Any]:
    """The methods named, with the settings that they have.

    Raises:
        ValueError: for an unknown method, or a setting that none of them has.
    """
    from ..core.registry import find, make, methods
    from ..study.plan import USUAL
    from .options import pairs

    slugs = list(methods()) if "all" in names else [find(name).slug for name in names] or list(USUAL)
    given = pairs(settings, "--set")
    known = {slug: {name: value for name, value in given.items() if name in _fields(slug)} for slug in slugs}
    for name in given:
        if not any(name in own for own in known.values()):
            raise ValueError(f"--set {name}: none of {', '.join(slugs)} has such a hyper-parameter")
    return [make(slug, **known[slug]) for slug in dict.fromkeys(slugs)]


def _fields(slug: str) -> set[str]:
    import dataclasses

    from ..core.registry import find

    return {item.name for item in dataclasses.fields(find(slug))}


def _record(made: Any) -> dict[str, Any]:
    """A plan as plain values."""
    return {
        "base": made.base,
        "parameters": made.parameters,
        "device": made.device,
        "memory": made.memory,
        "work": asdict(made.work),
        "lengths": None if made.lengths is None else asdict(made.lengths),
        "methods": [
            {
                "method": one.method,
                "trainable": one.trainable,
                "share": one.share,
                "saved_bytes": one.stored_bytes,
                "dtype": one.dtype,
                "peak": one.peak,
                "split": {kind: getattr(one.step, kind) for kind in SPLIT},
                "kept_for_backward": one.step.saved,
                "time": one.time,
                "fits": one.fits,
                "largest_batch": one.largest_batch,
                "changes": [asdict(change) for change in one.changes],
            }
            for one in made.forecasts
        ],
        "reasons": made.reasons,
    }


def _show(made: Any, console: Any) -> None:
    from rich.table import Table

    from ..study.memory import shown

    work = made.work
    what = "images" if work.task == "image-classification" else f"x {work.length} tokens"
    extras = [word for word, on in (("packed", work.packed), ("padded", work.padded)) if on]
    console.print(
        f"{made.base}: {made.parameters:,} parameters; {work.task}, batch {work.batch_size} {what}"
        + (f" ({', '.join(extras)})" if extras else "")
    )
    if made.lengths is not None:
        told = made.lengths
        console.print(
            f"data: {told.tokens:,.0f} tokens a batch on average, {100 * told.padding:.0f} % of it padding besides; "
            f"the longest example has {told.longest:,}"
        )
        if told.padding > 0.2 and work.task == "causal-lm":
            console.print(f"--packing would save the padding, {100 * told.padding:.0f} % of each step")
    known = made.memory is not None
    table = Table(
        title=f"Peak memory on {made.device}" + (f", {shown(made.memory)} may be taken" if known else ""),
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for column in ("trainable", "saved", *SPLIT, "peak", "time", "largest batch"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in made.forecasts:
        table.add_row(
            one.method, f"{one.trainable:,}", shown(one.stored_bytes),
            *(shown(getattr(one.step, kind)) for kind in SPLIT),
            shown(one.peak) if one.fits is not False else f"[red]{shown(one.peak)}[/]",
            "-" if one.time is None else f"{one.time:.2f}",
            "-" if one.largest_batch is None else f"{one.largest_batch:,}",
        )  # fmt: skip
    console.print(table)
    console.print("split: at the moment of the peak; time: a step over the frozen base's forward and backward pass")
    short = [one for one in made.forecasts if one.fits is False]
    for one in short:
        console.print(f"\n{one.method} does not fit" + (", but with" if one.changes else ""))
        for change in one.changes:
            taken = "" if change.time is None else f", time {change.time:.2f}"
            short_still = "" if change.fits else ", still too much"
            console.print(f"  {change.what:34} {shown(change.peak):>9}{taken}{short_still}", markup=False)
    if short and made.fitting:
        console.print("\nfits as it is: " + ", ".join(f"{one.method} ({shown(one.peak)})" for one in made.fitting))
    for slug, reason in made.reasons.items():
        console.print(f"{slug}: {reason}", markup=False)
