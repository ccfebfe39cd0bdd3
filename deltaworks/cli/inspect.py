"""`deltaworks inspect`: what a base is made of, or what an adapter holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    what: Annotated[str, typer.Argument(help="A base (name, folder, nursery:NAME) or an adapter's folder.")],
    on: Annotated[str | None, typer.Option(help="Mark what this role, expression or type names.")] = None,
    method: Annotated[str | None, typer.Option(help="Mark what this method would touch.")] = None,
    task: Annotated[str, typer.Option(help="What the base is loaded for.")] = "causal-lm",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a base's tree with roles, shapes and sizes (no weight is loaded), or an adapter's content.

    Examples: [dim]deltaworks inspect nursery:decoder --on attention[/] · [dim]deltaworks inspect runs/a/adapter[/]
    """
    folder = Path(what)
    if (folder / "adapter.json").is_file() or (folder / "adapter_config.json").is_file():
        from .. import adapters

        print(json.dumps(adapters.inspect(folder), indent=1, default=str))
        return
    from ..model.anatomy import Site, describe
    from ..model.loading import load_meta
    from .opening import base_name

    if on is not None and method is not None:
        raise ValueError("--on and --method both say what to mark; give one of them")
    model = load_meta(base_name(what), task)
    anatomy = describe(model)
    marked: list[Site] = []
    if on is not None:
        try:
            marked = anatomy.select(on)
        except ValueError:
            marked = anatomy.select(on, what="module")
    if method is not None:
        import torch

        from ..core.attach import attach, detach
        from ..core.registry import make

        with torch.device("meta"):
            tuned = attach(model, make(method))
        marked = [part.site for part in tuned.parts()]
        detach(model)
        anatomy = describe(model)
    from ..model import tree

    if as_json:
        print(json.dumps(tree.as_dict(anatomy, marked), indent=1))
        return
    from rich.console import Console

    Console().print(tree.rendered(anatomy, marked))
