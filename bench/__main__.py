"""`python -m bench`: all benchmarks; `--only NAME` those whose name contains it; `--quick` to try them."""

from __future__ import annotations

import argparse
import importlib
import sys

BENCHMARKS = ("step", "shapes", "run", "growth", "finished")


def main() -> None:
    """Run the chosen benchmarks; further arguments go to each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true", help="one repeat, small sizes; results are named quick-...")
    options, rest = parser.parse_known_args()
    chosen = [name for name in BENCHMARKS if options.only in name]
    if not chosen:
        raise SystemExit(f"bench: there is no benchmark {options.only!r}; there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        sys.argv = [f"bench.{name}", *(["--quick"] if options.quick else []), *rest]
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
