"""`deltaworks export`: an adapter in another program's format, or in another form of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder (ours or PEFT's).")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    format: Annotated[str, typer.Option(help="peft, vllm (a plain LoRA it accepts), deltaworks or residual.")] = "peft",
    base: Annotated[str | None, typer.Option(help="The base; the one the adapter names, if not given.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="vllm: the LoRA's rank; the smallest exact one, if not given.")
    ] = None,
    start: Annotated[
        str, typer.Option(help="deltaworks: values, or recompute to leave out what the seed gives again.")
    ] = "values",
    dtype: Annotated[
        str | None, typer.Option(help="residual: the base's, float32 to round nothing; its own, if not given.")
    ] = None,
    task: Annotated[str, typer.Option(help="What the base is loaded for.")] = "causal-lm",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter for HF PEFT or vLLM, or bring a PEFT adapter into our format.

    residual writes a base without the start that PiSSA and its kin subtract, and the adapter that belongs on it.

    Examples: [dim]deltaworks export runs/a/adapter --output peft-adapter[/] ·
    [dim]deltaworks export runs/a/adapter --format vllm --rank 16 --output served[/]
    """
    from .. import adapters
    from .opening import fresh_folder, open_tuned

    if format not in ("residual", "peft", "vllm", "deltaworks"):
        raise ValueError(f"--format {format} is not known; it is residual, peft, vllm or deltaworks")
    if rank is not None and format != "vllm":
        raise ValueError("--rank only makes sense with --format vllm")
    if start != "values" and format != "deltaworks":
        raise ValueError("--start only makes sense with --format deltaworks")
    if dtype is not None and format != "residual":
        raise ValueError("--dtype only makes sense with --format residual")
    fresh_folder(output)
    if format == "residual" and output.exists():
        raise ValueError(f"{output} exists already; --format residual takes a folder that does not")
    _, tokenizer, tuned = open_tuned(adapter, base, task, dtype)
    report: dict[str, Any] = {"output": str(output), "format": format}
    if format == "vllm":
        made = adapters.export(tuned, output, rank=rank)
        report |= {"rank": made.rank, "error": made.error, "errors": made.errors, "broken": made.broken}
    elif format == "residual":
        adapters.export_residual(tuned, output, beside=tokenizer)
    else:
        adapters.save(tuned, output, format=format, start=start)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(report, default=str))
        return
    print(f"{format} {'base and adapter' if format == 'residual' else 'adapter'} in {output}")
    if format == "vllm":
        print(f"rank {report['rank']}, {100 * report['error']:.3g} % of the change lost")
        for rule in report["broken"]:
            print(f"vLLM would refuse it: {rule}")
