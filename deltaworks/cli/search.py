"""`deltaworks search`: which methods, on which blocks, of which sizes; or, with --fair, what to train to be fair."""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..study.search_spec import Search
from ..training.recipe import Recipe
from . import options

if typing.TYPE_CHECKING:
    from ..study.pareto import Found

# Demonstration, when neither base nor data nor a search is given.
DEMONSTRATION = {"base": "nursery:decoder-xs", "steps": 60, "limit": 400, "max_length": 128, "samples": 0, "trials": 12}


def command(**given: Any) -> None:
    """Search for the methods, blocks and sizes that nobody beats in both quality and cost; each becomes a recipe.

    Examples: [dim]deltaworks search --base ./roberta --data reviews.csv --steps 1000 --trials 200[/] ·
    [dim]deltaworks search --base ./vit --data scans.csv --fair sex --epochs 10 --output runs/fair[/] ·
    [dim]deltaworks search task.yaml --start-from runs/search[/] ·
    [dim]deltaworks tune runs/search/pareto/01-lora.yaml[/]
    """
    from ..study import needs

    needs("search", "matplotlib", "optuna", "plotly", "scipy")
    from ..study.engine import Runner
    from ..study.search import search
    from ..study.search_pages import save

    as_json, path, output = given.pop("as_json"), given.pop("search"), given.pop("output")
    jobs, ray, cache = given.pop("jobs"), given.pop("ray"), given.pop("cache")
    storage, start_from = given.pop("storage"), given.pop("start_from")
    keys = options.given(given)
    if "methods" in keys:
        keys["methods"] = options.listed(keys["methods"])
    if "rates" in keys:
        keys["rates"] = _bounds(keys["rates"])
    if path is None and not {"base", "data", "steps", "epochs"} & set(keys):
        keys = DEMONSTRATION | keys
    wanted = Search.read(path, **keys) if path is not None else Search.of(keys)
    folder = Path(output) if output else Path("runs") / (path.stem if path is not None else "search")
    told = _Told(quiet=as_json)
    with Runner(cache, jobs, ray) as runner:
        found = search(wanted, runner, folder, storage=storage, start_from=start_from, tell=told.hear)
    report = save(found, folder)
    if as_json:
        best = [
            {"recipe": str(one.path), **one.decided, "value": one.value, "cost": one.cost, "trainable": one.trainable,
             "full_value": one.full_value} for one in found.best
        ]  # fmt: skip
        counts = {state: sum(one["status"] == state for one in found.trials) for state in ("done", "pruned", "failed")}
        about = {"output": str(folder), "metric": found.metric, "run": found.run, "agreement": found.agreement}
        print(json.dumps(about | counts | {"best": best}, default=str))
        return
    told.close(found, report)


def _bounds(text: str) -> list[float]:
    """`1e-5,1e-3` as numbers.

    Raises:
        ValueError: for anything else.
    """
    try:
        low, high = (float(one) for one in text.split(","))
    except ValueError:
        raise ValueError(
            f"--rates {text} is not understood; write the lowest and the highest, such as 1e-5,1e-3"
        ) from None
    return [low, high]


class _Told:
    """Prints a line for each trial, and the outcome."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(highlight=False, quiet=quiet)

    def hear(self, event: str, **figures: Any) -> None:
        """One event of `search`."""
        from ..study.pareto import described

        say = self.console.print
        if event == "space":
            parts = [", ".join(figures["methods"])] if figures["methods"] else []
            parts += [f"{figures['layers']} blocks"] * bool(figures["layers"])
            parts += [f"{figures['pieces']} pieces of the base"] * bool(figures["pieces"])
            say(f"space    {figures['configurations']:,.0f} configurations: {'; '.join(parts)}")
        elif event == "trial":
            value = "" if figures["value"] is None else f"{figures['value']:.5g}"
            cost = "" if figures["cost"] is None else f" at {figures['cost']:,.6g}"
            said = {"done": value + cost, "pruned": "stopped", "failed": f"failed: {figures['error']}"}
            text = f"{described(figures['decided'])}: {said[figures['status']]}"
            say(f"trial    {figures['done']}/{figures['total']} {text}", markup=False)
        elif event == "full":
            said = f", failed: {figures['error']}" if figures["error"] else ""
            say(f"full     {figures['done']}/{figures['total']}{said}", markup=False)
        elif event == "exhausted":
            say(f"search   ends here: {figures['reason']}", markup=False)

    def close(self, found: Found, report: Path) -> None:
        """Print what came out."""
        from ..study.pareto import described

        table = Table(title="what no other trial beats", title_justify="left")
        columns = ["recipe", "configuration", f"{found.metric}, trial", f"{found.metric}, full run", "trainable"]
        cost = found.search.cost
        for column in [*columns, *([cost] if cost not in ("none", "params") else [])]:
            table.add_column(column, justify="left" if column in columns[:2] else "right")
        for one in found.best:
            assert one.path is not None
            whole = "-" if one.full_value is None else f"{one.full_value:.5g}"
            extra = [f"{one.cost:,.6g}"] if cost not in ("none", "params") else []
            table.add_row(
                one.path.name, described(one.decided), f"{one.value:.5g}", whole, f"{one.trainable:,}", *extra
            )
        self.console.print(table)
        states = [one["status"] for one in found.trials]
        said = ", ".join(f"{states.count(state)} {state}" for state in ("done", "pruned", "failed"))
        self.console.print(f"trials   {said}")
        if found.agreement is not None:
            self.console.print(f"order    trials and full runs agree with a rank correlation of {found.agreement:.2f}")
        self.console.print(f"results  {report}", soft_wrap=True)
        self.console.print(f"next     deltaworks tune {found.winner.path}", soft_wrap=True)


command.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
    options.file("search", "A search's YAML file."),
    *options.declared(Search, ("keys",), {
        "methods": (options.SEVERAL, "A,B,..."), "rates": (str | None, "LOW,HIGH"),
    }),
    *options.declared(Recipe, options.NOT_FOR_ALL),
    options.parameter("start_from", str | None, typer.Option(
        help="folder of another search, whose best are tried first", metavar="FOLDER",
    )),
    options.parameter("storage", str | None, typer.Option(
        help="where trials are kept: a database's URL [default: search.db in --output]", metavar="URL",
    )),
    *options.running("folder of the results; a search that is there goes on [default: runs/SEARCH]"),
])  # fmt: skip
