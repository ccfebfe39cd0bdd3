"""`make bench ONLY=finished`: saving, loading, switching, merging a LoRA on a 7B-shaped base, beside PEFT."""

from __future__ import annotations

from typing import Any

from . import measure, picture
from .measure import RESULTS, forked, heading, interleaved, median, over, ratio, write

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden": 4096, "inner": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "vocabulary": 32000},
    "tiny": {"hidden": 64, "inner": 128, "layers": 2, "heads": 2, "kv_heads": 2, "vocabulary": 256},
}
WHAT = (
    "attach", "save", "load", "switch", "save in PEFT's format", "load PEFT's format", "merge", "unmerge",
)  # fmt: skip


def rows_of(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Work -> side or "ratio" -> seconds and memory."""
    rows: dict[str, Any] = {}
    for what in WHAT:
        keys = {key: f"{key} {what}" for key in ("seconds", "memory")}
        rows[what] = {side: {key: median(taken, own) for key, own in keys.items()} for side, taken in samples.items()}
        rows[what]["ratio"] = {key: ratio(samples["ours"], samples["peft"], own) for key, own in keys.items()}
    return rows


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record."""
    size = record["settings"]
    lines = heading(f"A finished LoRA of rank {size['rank']} on all linear layers of a {record['shape']} base", record)
    lines += [
        f"Medians; ratios are ours over PEFT's (least to greatest). The base's {size['layers']} layers are bfloat16, "
        f"mapped and not filled; merging and unmerging run on {size['merged_layers']} of them with weights in memory. "
        "PEFT's save and load are in its own format in both rows. Memory is the peak that the work added.",
        "",
        "| work | ours, ms | PEFT, ms | time | ours, MB | PEFT, MB | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, row in record["rows"].items():
        cells = []
        for key, unit in (("seconds", 1e3), ("memory", 1e-6)):
            cells += [_number(row[side][key], unit) for side in ("ours", "peft")]
            cells.append(over(row["ratio"][key]))
        lines.append(f"| {what} | {' | '.join(cells)} |")
    failed = [f"{side}: {samples[0]['error']}" for side, samples in record["samples"].items() if "error" in samples[0]]
    return "\n".join(lines + (["", *failed] if failed else []))


def _number(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value * unit:.3g}"


def main() -> None:
    """Run the benchmark and write its results."""
    parser = measure.arguments("finished", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--merged-layers", type=int, default=4, help="layers with weights in memory, 0.4 GB each at 7B")
    options = measure.chosen(parser, shape="tiny", merged_layers=1)
    settings = SHAPES[options.shape] | {"rank": options.rank, "merged_layers": options.merged_layers}
    sides = {side: settings | {"side": side} for side in ("ours", "peft")}
    samples = interleaved("bench.finished_worker", sides, options.repeats, options.threads, forked)
    record = measure.record(
        "finished", options, samples, shape=options.shape, settings=settings, rows=rows_of(samples)
    )
    write(options.name, record, table(record))
    picture.finished(record, RESULTS / f"{options.name}.png")


if __name__ == "__main__":
    main()
