"""The command line: one file per command. Wrong input ends with one line on standard error and a non-zero status."""

from __future__ import annotations

import sys

import typer

app = typer.Typer(
    name="deltaworks",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tune a model by changing less of it: every published way, one command.",
)


def _commands() -> None:
    from . import chat, export, inspect, merge, methods, tune

    for module in (tune, methods, inspect, merge, export, chat):
        app.command(name=module.__name__.rpartition(".")[2], rich_help_panel=None)(module.command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a person did wrong is said in one line, everything else keeps its traceback."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _commands()
    try:
        app(args=arguments, prog_name="deltaworks")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("DELTAWORKS_TRACEBACK"):
            raise
        print(f"deltaworks: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("deltaworks: stopped by the keyboard", file=sys.stderr)
        raise SystemExit(130) from None
