"""What a person sees while a study runs, and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ..study.compare import Comparison
from ..study.summary import COSTS, cost_text, interval, sentences, summarise

STAGES = {"rates": "learning rates", "runs": "runs"}
WIDTH = 108  # of the table; a narrower terminal breaks its lines
SHOWN = ("trainable", "peak_memory_bytes", "step_seconds")


class Progress:
    """Hears the events of a study, shows a bar for each stage, and prints the outcome."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.console.width = max(self.console.width, WIDTH)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}
        self.failed: set[tuple[str, str]] = set()

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def hear(self, event: str, **figures: Any) -> None:
        """One event of `compare`."""
        if event == "sizes":
            where = f" ({figures['cell']})" if figures["cell"] else ""
            self.console.print(f"size     {figures['name']}{where}: {figures['note']}")
        elif event in STAGES and figures["total"]:
            # Rates come in rounds: each begins anew.
            if figures["done"] == 0 or event not in self.tasks:
                known = self.tasks.pop(event, None)
                if known is not None:
                    self.bar.remove_task(known)
                self.tasks[event] = self.bar.add_task(STAGES[event], total=figures["total"], said="")
            said = f"{figures['cached']} known" if figures["cached"] else ""
            self.bar.update(self.tasks[event], completed=figures["done"], said=said)
        elif event == "row" and figures["row"]["status"] == "failed":
            name, error = figures["trial"].labels["name"], figures["row"]["error"]
            if (name, error) not in self.failed:
                self.failed.add((name, error))
                self.console.print(f"failed   {name}: {error}", markup=False)

    def close(self, found: Comparison, report: Path) -> None:
        """Print what came out."""
        for cell in summarise(found)["cells"]:
            table = Table(title=cell["name"] or None, title_justify="left")
            table.add_column("method")
            table.add_column(f"{cell['metric']} [95 %]", justify="right")
            table.add_column("beats others", justify="right")
            for cost in SHOWN:
                table.add_column(COSTS[cost], justify="right")
            for one in cell["methods"]:
                if one["mean"] is None:
                    table.add_row(one["name"], "failed", *([""] * (1 + len(SHOWN))))
                    continue
                wins = "-" if one["wins"] is None else f"{100 * one['wins']:.0f} %"
                table.add_row(one["name"], interval(one), wins, *(cost_text(one, cost) for cost in SHOWN))
            self.console.print(table)
            for text in sentences(cell):
                self.console.print(f"  {text}", markup=False)
        self.console.print(f"\nruns     {found.run} run, {found.cached} known already")
        self.console.print(f"results  {report.parent}", soft_wrap=True)
        self.console.print(f"report   {report}", soft_wrap=True)
