"""`python -m bench`: all benchmarks; `--only NAME` those whose name contains it; `--quick` to try them."""

from __future__ import annotations

import argparse
import importlib
import sys

# The benchmarks, and the arguments with which each is done in a minute or so.
BENCHMARKS: dict[str, list[str]] = {
    "step": ["--methods", "lora", "--repeats", "1", "--steps", "2", "--name", "quick-step"],
    "shapes": ["--quick"],
    "run": ["--quick"],
    "growth": ["--quick"],
    "finished": ["--quick"],
}


def main() -> None:
    """Run the chosen benchmarks; further arguments go to each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true", help="few repeats, small sizes; results are named quick-...")
    options, rest = parser.parse_known_args()
    chosen = [name for name in BENCHMARKS if options.only in name]
    if not chosen:
        raise SystemExit(f"bench: there is no benchmark {options.only!r}; there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        sys.argv = [f"bench.{name}", *(BENCHMARKS[name] if options.quick else []), *rest]
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
