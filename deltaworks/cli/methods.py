"""`deltaworks methods`: the catalogue."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer


def command(
    name: Annotated[str | None, typer.Argument(help="One method: its page's summary and hyper-parameters.")] = None,
    base: Annotated[str | None, typer.Option(help="A base, by name, folder or nursery:NAME: adds sizes on it.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    task: Annotated[str, typer.Option(help="What the base is loaded for.")] = "causal-lm",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods; with --base, what each would cost there (no weight is loaded).

    Examples: [dim]deltaworks methods[/] · [dim]deltaworks methods lora[/] ·
    [dim]deltaworks methods --base nursery:decoder[/]
    """
    from ..core.registry import find, methods

    if name is not None:
        _one(find(name), as_json)
        return
    chosen = [cls for cls in methods().values() if family in (None, cls.family)]
    if not chosen:
        families = sorted({cls.family for cls in methods().values()})
        raise ValueError(f"there is no family {family!r}; there are {', '.join(families)}")
    sizes = _sizes(base, task, chosen) if base else {}
    if as_json:
        print(json.dumps([_record(cls) | sizes.get(cls.slug, {}) for cls in chosen], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Methods" + (f" on {base}" if base else ""), title_justify="left")
    for column in ("method", "family", "paper", "merges", "needs data"):
        table.add_column(column)
    if base:
        table.add_column("trainable", justify="right")
        table.add_column("share", justify="right")
        table.add_column("saved bytes", justify="right")
    table.add_column("what it is")
    for cls in chosen:
        row = [cls.slug, cls.family, cls.paper, "yes" if cls.mergeable else "no", "yes" if cls.needs_data else ""]
        if base:
            size = sizes[cls.slug]
            row += (
                [f"{size['trainable']:,}", f"{100 * size['share']:.3f} %", f"{size['saved_bytes']:,}"]
                if "trainable" in size
                else ["-", "-", size["reason"]]
            )
        table.add_row(*row, _title(cls))
    Console().print(table)


def _title(cls: Any) -> str:
    import sys

    page = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
    return page.strip().split("\n")[0].split(" (")[0].rstrip(".")


def _record(cls: Any) -> dict[str, Any]:
    return {
        "method": cls.slug,
        "family": cls.family,
        "paper": cls.paper,
        "mergeable": cls.mergeable,
        "needs_data": cls.needs_data,
        "title": _title(cls),
    }


def _one(cls: Any, as_json: bool) -> None:
    import sys

    fields = [
        {"name": item.name, "default": default(item), "help": item.metadata["help"], "range": item.metadata["wanted"]}
        for item in dataclasses.fields(cls)
    ]
    if as_json:
        print(json.dumps(_record(cls) | {"hyper_parameters": fields}, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{cls.slug}[/]  family {cls.family}, dw.{cls.__name__}, arXiv {cls.paper}\n")
    console.print((sys.modules[cls.__module__].__doc__ or "").strip(), markup=False)
    table = Table(title="\nHyper-parameters (--set NAME=VALUE)", title_justify="left")
    for column in ("name", "default", "allowed", "meaning"):
        table.add_column(column)
    for item in fields:
        table.add_row(item["name"], str(item["default"]), item["range"], item["help"])
    console.print(table)


def default(item: dataclasses.Field) -> Any:
    """A hyper-parameter's default value."""
    return item.default_factory() if callable(item.default_factory) else item.default


def _sizes(base: str, task: str, chosen: list[Any]) -> dict[str, dict[str, Any]]:
    from ..core.costs import size_on
    from ..model.loading import load_meta
    from .opening import base_name

    model = load_meta(base_name(base), task)
    return {cls.slug: size_on(model, cls()) for cls in chosen}
