"""The command line: one file per command. Wrong input ends with one line on standard error and a non-zero status."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

# What the overview says of each command; a command's own module, and torch with it, is imported only when it is run.
COMMANDS = {
    "tune": "One run: base, data and method in, adapter, metrics and report out.",
    "compare": "Several methods on the same work, with repeats, intervals and pictures.",
    "recommend": "Which method to take: a short list from a finished study.",
    "search": "Which methods, on which blocks, of which sizes: the best for each cost, as recipes.",
    "methods": "The catalogue; with --base, what each method would cost there.",
    "plan": "Memory, sizes and time of a run, predicted before a weight is loaded.",
    "inspect": "What a base is made of, or what an adapter holds.",
    "merge": "Base and adapter as one ordinary model.",
    "export": "An adapter in the format of HF PEFT or vLLM.",
    "chat": "Talk to a base with adapters, switching between them.",
}


def _app(wanted: str | None) -> typer.Typer:
    app = typer.Typer(
        name="deltaworks",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        help="Fine-tune a model by changing less of it: every published way, one command.",
        epilog="deltaworks COMMAND --help shows a command's options and examples.",
    )
    app.callback()(lambda: None)
    for name, text in COMMANDS.items():
        if name == wanted:
            app.command(name=name)(importlib.import_module(f".{name}", __package__).command)
        else:
            app.command(name=name, help=text)(_elsewhere(name))
    return app


def _elsewhere(name: str) -> Callable[[], Any]:
    def command() -> None:
        raise ValueError(f"put the command first: deltaworks {name} ...")

    return command


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a person did wrong is said in one line, everything else keeps its traceback.

    Args:
        arguments: what was typed after the program's name; `sys.argv`'s by default.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        _app(typed[0] if typed else None)(args=typed, prog_name="deltaworks")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("DELTAWORKS_TRACEBACK"):
            raise
        print(f"deltaworks: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("deltaworks: stopped by the keyboard", file=sys.stderr)
        raise SystemExit(130) from None
