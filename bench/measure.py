"""How the benchmarks measure: every sample in a fresh process, the sides in turn, medians and ranges."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def forked(module: str, settings: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """One measurement: `MODULE.measure(settings)` in a fresh process.

    The process is a fork of one that has imported the libraries and computed nothing: as clean as a new interpreter,
    without the ten seconds that its imports take.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(threads))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "psutil", "deltaworks", module])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(theirs, module, dict(settings)))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        result = {"error": "the process died without a word"}
    process.join()
    return result


def _measured(results: Any, module: str, settings: dict[str, Any]) -> None:
    try:
        results.send(importlib.import_module(module).measure(settings))
    except Exception as error:  # a side that fails is a row of the table
        results.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def sample(module: str, settings: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """One measurement: `python -m MODULE JSON` in a fresh process, whose last line of output is a JSON object."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(settings)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return {"error": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])


def interleaved(
    module: str,
    sides: Mapping[str, Mapping[str, Any]],
    repeats: int,
    threads: int,
    take: Callable[[str, Mapping[str, Any], int], dict[str, Any]] = sample,
    references: Sequence[str] = (),
    every: int = 12,
) -> dict[str, list[dict[str, Any]]]:
    """Every side once, then every side again, ...: a drift of the machine's speed meets all of them.

    Sides of `references` are measured again before every `every` others and at the end: among a hundred sides a repeat
    takes so long that the machine is another one by its end. Each sample carries its `turn`, for `nearest`.

    An interrupt ends it with the repeats that are complete, if there are any; see `complete`.
    """
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    others = [name for name in sides if name not in references]
    order = [name for at in range(0, len(others), every) for name in (*references, *others[at : at + every])]
    turn = 0
    try:
        for turn, name in enumerate([*order * repeats, *references]):
            if samples[name] and "error" in samples[name][0]:
                continue
            samples[name].append(take(module, sides[name], threads) | {"turn": turn})
            print(f"  {turn} of {len(order) * repeats} {name}: {brief(samples[name][-1])}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        whole = turn // len(order)
        if not whole:
            raise
        print(f"interrupted: {whole} of {repeats} repeats are complete and kept", file=sys.stderr, flush=True)
        return {name: [one for one in mine if one["turn"] < whole * len(order)] for name, mine in samples.items()}
    return samples


def complete(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """The repeats of every side that did not fail; references may have more."""
    return min((len(found) for found in samples.values() if "error" not in found[0]), default=0)


def nearest(samples: Iterable[Mapping[str, Any]], references: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For each sample the one of a reference that was measured nearest to it."""
    return [min(references, key=lambda one: abs(one["turn"] - sample["turn"])) for sample in samples]


def brief(result: Mapping[str, Any]) -> str:
    """A sample in a few words."""
    if "error" in result:
        return f"failed: {result['error']}"
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, (int, float)))


def median(samples: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """The median of a figure, None when the side failed."""
    values = [sample[key] for sample in samples if key in sample]
    return statistics.median(values) if values else None


def ratio(ours: list[Mapping[str, Any]], theirs: list[Mapping[str, Any]], key: str) -> dict[str, float] | None:
    """Ratio of a figure, repeat by repeat: median, least, greatest."""
    pairs = [a[key] / b[key] for a, b in zip(ours, theirs, strict=False) if key in a and key in b and b[key]]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)} if pairs else None


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    versions["python"] = platform.python_version()
    for name in ("peft", "trl", "liger_kernel", "lycoris_lora"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else _processor()
    return {"device": device, "cores": os.cpu_count(), "versions": versions, "date": datetime.date.today().isoformat()}


def arguments(name: str, about: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one repeat on small settings, to see that it works")
    parser.add_argument("--name", default=name, help="of the results")
    return parser


def chosen(parser: argparse.ArgumentParser, **small: Any) -> argparse.Namespace:
    """The arguments of the command line; `small` in their place, and a name of its own, where it says `--quick`."""
    options = parser.parse_args()
    if options.quick:
        vars(options).update(small, repeats=1, name=f"quick-{options.name}")
    return options


def record(
    benchmark: str, options: argparse.Namespace, samples: Mapping[str, Sequence[Mapping[str, Any]]], **found: Any
) -> dict[str, Any]:
    """What is kept of a benchmark: how it was made, what it found, and the samples as `interleaved` took them."""
    return {
        "command": " ".join([f"python -m bench --only {benchmark}", *sys.argv[1:]]),
        "machine": machine(),
        "threads": options.threads,
        "repeats": complete(samples),
        **found,
        "samples": samples,
    }


def heading(title: str, record: Mapping[str, Any]) -> list[str]:
    """The lines that a table begins with: what was measured, on what, when and how."""
    return [f"# {title}", "", f"{described(record)}. `{record['command']}`", ""]


def described(record: Mapping[str, Any]) -> str:
    """Machine, versions, date and repeats in one line."""
    where = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['device']}, {record['threads']} threads, {record['repeats']} repeats, {where['date']}; {versions}"


def over(value: Mapping[str, float] | None) -> str:
    """A ratio as a table's cell: median and range, empty where there is none."""
    return "" if value is None else f"{value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(name: str, record: Mapping[str, Any], table: str) -> None:
    """Write `bench/results/NAME.json` and `NAME.md`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table + "\n")
    print(table)
