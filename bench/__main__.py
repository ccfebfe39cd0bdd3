"""`python -m bench`: all benchmarks, each in turn; `--only NAME` those whose name contains it."""

from __future__ import annotations

import argparse
import importlib
import sys

BENCHMARKS = ("step",)


def main() -> None:
    """Run the chosen benchmarks; further arguments go to each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    options, rest = parser.parse_known_args()
    chosen = [name for name in BENCHMARKS if options.only in name]
    if not chosen:
        raise SystemExit(f"bench: there is no benchmark {options.only!r}; there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        sys.argv = [f"bench.{name}", *rest]
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
