"""`deltaworks merge`: base and adapter as one ordinary model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder (ours or PEFT's).")],
    output: Annotated[Path, typer.Option(help="Folder for the merged model; must not exist.")],
    base: Annotated[str | None, typer.Option(help="The base; the one the adapter names, if not given.")] = None,
    task: Annotated[str, typer.Option(help="What the base is loaded for.")] = "causal-lm",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; the base's own, if not given.")] = None,
    untie: Annotated[bool, typer.Option(help="Give a tied head or embedding a copy of its own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fold an adapter into its base and save the result, which any program loads as an ordinary model.

    Example: [dim]deltaworks merge runs/a/adapter --output merged[/]
    """
    from ..adapters.files import Replacement
    from ..core.attach import bake
    from .opening import fresh_folder, open_tuned

    fresh_folder(output)
    model, tokenizer, _ = open_tuned(adapter, base, task, dtype)
    bake(model, untie=untie)
    with Replacement(output, ()) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if as_json:
        print(json.dumps({"output": str(output)}))
    else:
        print(f"merged model in {output}")
