"""What a person sees while a run goes on."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ..training.recipe import Recipe
from ..training.tune import Result


class Progress:
    """Hears the events of a run, shows a bar, and prints the outcome."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.console = Console(highlight=False)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.work: Any = None

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def hear(self, event: str, **figures: Any) -> None:
        """One event of `tune`."""
        say = self.console.print
        if event == "data":
            say(f"data     {self.recipe.data}: {figures['rows']:,} to learn from, {figures['held_out']:,} held out"
                f" ({figures['task']})")  # fmt: skip
        elif event == "base":
            say(f"base     {figures['name']}: {figures['kind']} on {figures['device']}")
        elif event == "adapter":
            say(f"method   {figures['method']}: {figures['trainable']:,} values train, {_percent(figures['share'])}")
        elif event in ("before", "after") and figures["figures"]:
            say(f"{event:8} held out: {_figures(figures['figures'])}")
        elif event == "step":
            if self.work is None:
                self.work = self.bar.add_task("training", total=figures["total"], loss="")
            self.bar.update(self.work, completed=figures["step"], loss=f"{figures['loss']:.4f}")
        elif event == "evaluated" and figures["figures"]:
            say(f"step {figures['step']:<4}held out: {_figures(figures['figures'])}")

    def close(self, result: Result) -> None:
        """Print what came out."""
        metrics = result.metrics
        if result.finished_before:
            self.console.print(f"the run in {result.output} is finished already")
        pairs = zip(metrics["samples"]["before"] or [], metrics["samples"]["after"] or [], strict=False)
        for number, (before, after) in enumerate(pairs, 1):
            table = Table(title=f"held-out example {number}", title_justify="left", show_header=False, width=100)
            table.add_column(style="bold", no_wrap=True)
            table.add_column(overflow="fold")
            for name, text in (
                ("prompt", after["prompt"]),
                ("wanted", after["reference"]),
                ("before", before["generated"]),
                ("after", after["generated"]),
            ):
                table.add_row(name, _short(text))
            self.console.print(table)
        if metrics["before"] and metrics["after"]:
            names = [name for name in metrics["after"] if name in metrics["before"]]
            table = Table("held out", "before", "after")
            for name in names:
                table.add_row(name, f"{metrics['before'][name]:.4f}", f"{metrics['after'][name]:.4f}")
            self.console.print(table)
        adapter, speed = metrics["adapter"], metrics["throughput"]
        for name, text in (
            ("trained", f"{adapter['trainable']:,} of {adapter['total']:,} parameters, {_percent(adapter['share'])}"),
            (
                "time",
                f"{speed['seconds']:.1f} s for {metrics['steps']} steps, {speed['tokens_per_second']:,.0f} tokens/s",
            ),
            ("memory", f"peak {metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"),
            ("adapter", f"{result.adapter} ({adapter['stored_bytes']:,} bytes)"),
            ("report", str(result.report)),
        ):
            self.console.print(f"{name:9}{text}", soft_wrap=True)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} % of the base"


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _short(text: Any, length: int = 400) -> str:
    plain = str(text).strip()
    return plain if len(plain) <= length else plain[: length - 3] + "..."
