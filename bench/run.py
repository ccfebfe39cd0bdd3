"""`make bench ONLY=run`: a whole run of `deltaworks tune` beside TRL's SFTTrainer with PEFT, on the same rows."""

from __future__ import annotations

import json
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import measure, picture
from .measure import RESULTS, heading, interleaved, median, over, ratio, write
from .step import SHAPES

GOALS = {"seconds": 0.75, "resident_above_base": 0.6}
FIGURES = ("seconds", "whole_seconds", "cpu_seconds", "resident_above_base", "cuda_peak", "supervised", "loss")
PATHS = ("base", "data", "validation", "folder")  # of the machine, no part of a record
# name -> what differs from the settings that both sides share
SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded alike": {"pad_to_multiple_of": 32},
    "packed": {"packing": True},
    "defaults": {"matched": False},
    "liger": {"liger": True},
}


def rows_to(folder: Path, count: int, held_out: int, seed: int) -> dict[str, str]:
    """Write `train.jsonl` and `held_out.jsonl` of the nursery's docstrings; prompts and completions of any length."""
    from deltaworks import nursery

    rows = [{key: row[key] for key in ("prompt", "completion")} for row in nursery.data("docstrings")["train"]]
    random.Random(seed).shuffle(rows)
    parts = {"train": rows[:count], "held_out": rows[count : count + held_out]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def base_in(folder: Path, shape: str) -> str:
    """The folder of the base: the nursery's decoder, or random weights of a shape with the decoder's tokenizer."""
    from deltaworks.nursery import base_path

    shipped = str(base_path("decoder"))
    if shape == "nursery":
        return shipped
    from transformers import AutoTokenizer

    from .step_worker import base

    place = str(folder / "base")
    base(SHAPES[shape] | {"tokens": 2048, "dtype": "bfloat16"}).save_pretrained(place)
    AutoTokenizer.from_pretrained(shipped).save_pretrained(place)
    return place


def without_liger() -> str | None:
    """Why there is no side with Liger's kernels, None where there is one."""
    import torch

    if not torch.cuda.is_available():
        return "Liger's kernels are written in Triton and need a GPU"
    return None if find_spec("liger_kernel") else "liger-kernel is not installed"


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record."""
    lines = heading(f"A run of `deltaworks tune` over TRL's SFTTrainer with PEFT, base {record['shape']}", record)
    lines += [
        "LoRA on the same rows for one epoch. Ours over theirs, pair by pair: median (least to greatest). `padded`, "
        "`packed`: matched settings; `padded alike`: TRL pads to multiples of 32 tokens, as ours does by itself for "
        "half precision on CPUs; `defaults`: each as it comes. Training is the loop alone, whole the process from its "
        "start, processor time that of the whole; memory is the peak resident set above that with the base loaded.",
        "",
        "| setting | training | whole | processor | memory | GPU memory | ours: s, MB | TRL: s, MB | targets | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in record["rows"].items():
        if "missing" in row:
            lines.append(f"| {name} | {row['missing']} |{' |' * 8}")
            continue
        cells = [over(row["ratios"][key]) for key in FIGURES[:5]]
        for side in ("ours", "trl"):
            seconds, bytes_ = row[side]["seconds"], row[side]["resident_above_base"]
            cells.append("failed" if seconds is None else f"{seconds:.1f}, {bytes_ / 1e6:.0f}")
        cells.append(" / ".join(f"{row[side]['supervised'] or 0:.0f}" for side in ("ours", "trl")))
        cells.append(" / ".join(f"{row[side]['loss'] or 0:.3f}" for side in ("ours", "trl")))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    goals = f"time at most {GOALS['seconds']}, memory at most {GOALS['resident_above_base']} at matched settings"
    return "\n".join([*lines, "", f"Goals: {goals}."])


def main() -> None:
    """Run the benchmark and write its results."""
    parser = measure.arguments("run", __doc__)
    parser.add_argument("--shape", choices=("nursery", *SHAPES), default="nursery")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="longest example, and the length of packed rows")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = measure.chosen(parser, rows=16)
    missing = without_liger()
    chosen = [name for name in options.settings if not (SETTINGS[name].get("liger") and missing)]
    with tempfile.TemporaryDirectory() as folder:
        files = rows_to(Path(folder), options.rows, max(options.rows // 9, 1), seed=0)
        common = {
            "base": base_in(Path(folder), options.shape), "data": files["train"], "validation": files["held_out"],
            "batch_size": options.batch, "max_length": options.tokens, "rank": options.rank, "dtype": options.dtype,
            "lr": 2e-4, "packing": False, "pad_to_multiple_of": None, "matched": True, "liger": False, "seed": 0,
            "threads": options.threads, "folder": folder,
        }  # fmt: skip
        sides = {
            f"{side} {name}": common | SETTINGS[name] | {"side": side} for name in chosen for side in ("ours", "trl")
        }
        samples = interleaved("bench.run_worker", sides, options.repeats, options.threads)
    rows: dict[str, Any] = {name: {"missing": f"not measured: {missing}"} for name in options.settings}
    for name in chosen:
        ours, theirs = samples[f"ours {name}"], samples[f"trl {name}"]
        rows[name] = {
            "ratios": {key: ratio(ours, theirs, key) for key in FIGURES},
            "ours": {key: median(ours, key) for key in FIGURES},
            "trl": {key: median(theirs, key) for key in FIGURES},
        }
    settings = {key: value for key, value in common.items() if key not in PATHS} | {"rows": options.rows}
    record = measure.record(
        "run", options, samples, shape=options.shape, settings=settings, goals=GOALS, rows=rows
    )
    write(options.name, record, table(record))
    picture.run(record, RESULTS / f"{options.name}.png")


if __name__ == "__main__":
    main()
