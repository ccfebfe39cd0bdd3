"""`deltaworks recommend`: which method to take."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

LEFT_OUT = 8
"""Methods that break a limit and are named, those first that gain most."""


def command(
    study: Annotated[
        Path | None, typer.Argument(help="A finished study's folder; the nursery's, which ships, when none is given.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Your base: costs are then planned for it instead of taken from the study.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only work of this task counts.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory at the peak of training, such as 8GiB.")] = None,
    max_params: Annotated[str | None, typer.Option(help="Most values that train, such as 1e5 or 100k.")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="Most bytes of the adapter, such as 2MiB.")] = None,
    max_step: Annotated[str | None, typer.Option(help="Longest step, such as 50ms, as the study measured it.")] = None,
    mergeable: Annotated[
        bool | None, typer.Option("--mergeable/--not-mergeable", help="Only methods that fold into the base, or not.")
    ] = None,
    data_free: Annotated[bool, typer.Option(help="Only methods that need no data before they attach.")] = False,
    batch_size: Annotated[int, typer.Option(help="Examples in a forward pass, where costs are planned.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of an example, where costs are planned.")] = 512,
    top: Annotated[int, typer.Option(help="How many are listed.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A ranked short list of methods for what you can afford, with the reason for each in one sentence.

    Examples: [dim]deltaworks recommend --max-params 1e5 --mergeable[/] ·
    [dim]deltaworks recommend runs/compare --memory 8GiB[/] ·
    [dim]deltaworks recommend --base ./llama --memory 24GiB --task causal-lm[/]
    """
    from ..study.recommend import Limits, plan_on, recommend, table
    from ..study.spec import amount

    limits = Limits(
        memory=None if memory is None else amount(memory, "bytes"),
        params=None if max_params is None else amount(max_params),
        stored=None if max_bytes is None else amount(max_bytes, "bytes"),
        step=None if max_step is None else amount(max_step, "seconds"),
        mergeable=mergeable,
        data_free=data_free,
        gains=study is None,  # there rates are of short runs, and some were too high
    )
    if base is not None and limits.step is not None:
        raise ValueError("--max-step is of the study's machine and base; leave it or --base out")
    cells = table(study)
    planned = None
    if base is not None:
        options = {"batch_size": batch_size, "max_length": max_length} | ({"task": task} if task else {})
        planned = plan_on(base, cells, **options)
    good, bad = recommend(cells, limits, task=task, planned=planned)
    if as_json:
        listed = {"recommended": good[:top], "left_out": bad}
        print(json.dumps({name: [dataclasses.asdict(one) for one in some] for name, some in listed.items()}, indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False)
    said = "the nursery’s study, small bases" if study is None else str(study)
    costs = f"costs planned for {base}" if base else "costs as measured there"
    console.print(f"from {said}; {costs}\n", markup=False)
    for place, one in enumerate(good[:top], 1):
        console.print(f"{place}. {one.reason}", markup=False)
    if not good:
        console.print("No method keeps within these limits.")
    if bad:
        shown = "; ".join(f"{one.name} ({one.why_not})" for one in bad[:LEFT_OUT])
        more = f"; and {len(bad) - LEFT_OUT} that gain less, see --json" if len(bad) > LEFT_OUT else ""
        console.print(f"\nleft out: {shown}{more}", markup=False)
    if study is None:
        console.print("\nYour data may say otherwise: deltaworks compare --base ... --data ...", markup=False)
