"""`make bench ONLY=growth`: what LoRA costs as ranks, sequences, models, adapters and vocabularies grow."""

from __future__ import annotations

from typing import Any

from . import measure, picture
from .measure import RESULTS, forked, heading, interleaved, median, over, ratio, write

SIZE: dict[str, Any] = {
    "hidden": 512, "inner": 1408, "layers": 2, "heads": 8, "kv_heads": 4, "vocabulary": 4096,
    "batch": 4, "tokens": 128, "rank": 8, "adapters": 1, "mixed": False, "head": False,
}  # fmt: skip
# what grows -> (the setting, its values, what else differs from SIZE)
GROWN: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "rank": ("rank", (2, 8, 32, 128), {}),
    "tokens": ("tokens", (64, 128, 256, 512), {}),
    "layers": ("layers", (1, 2, 4, 8), {}),
    "stacked adapters": ("adapters", (1, 2, 4, 8), {}),
    "adapters in a batch of 8": ("adapters", (1, 2, 4, 8), {"mixed": True, "batch": 8, "tokens": 64}),
    "vocabulary": ("vocabulary", (4096, 16384, 65536), {"head": True}),
}
FIGURES = ("seconds", "saved_bytes", "resident_above_base", "cuda_peak")


def points(chosen: list[str], quick: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """What grows -> its value -> the settings of that point."""
    small = SIZE | {"hidden": 64, "inner": 128, "heads": 2, "kv_heads": 2, "vocabulary": 256} if quick else SIZE
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for what in chosen:
        key, values, other = GROWN[what]
        found[what] = {str(value): small | other | {key: value} for value in values[: 2 if quick else None]}
    return found


def label(point: dict[str, Any]) -> str:
    """What tells a point from the others."""
    return ", ".join(f"{key} {value}" for key, value in point.items() if value != SIZE[key]) or "as is"


def rows_of(found: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What grows -> side or "ratio" -> value -> figures."""
    rows: dict[str, Any] = {}
    for what, axis in found.items():
        rows[what] = {"ours": {}, "peft": {}, "ratio": {}}
        for value, point in axis.items():
            ours, theirs = (samples[f"{side} {label(point)}"] for side in ("ours", "peft"))
            for side, taken in (("ours", ours), ("peft", theirs)):
                rows[what][side][value] = {key: median(taken, key) for key in FIGURES}
                if "error" in taken[0]:
                    rows[what][side][value]["error"] = taken[0]["error"]
            rows[what]["ratio"][value] = {key: ratio(ours, theirs, key) for key in FIGURES}
    return rows


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record."""
    size = ", ".join(f"{key} {value}" for key, value in SIZE.items() if not isinstance(value, bool))
    lines = heading("LoRA as things grow, ours over PEFT's", record)
    lines += [
        f"Everything but what grows is as here: {size}, {record['settings']['dtype']}. Medians (least to greatest). A "
        "step is forward, backward and optimizer step; for the adapters in a batch, a forward pass in which every "
        "example has its own. For the vocabulary each side computes the loss as its trainer does: `deltaworks tune` "
        "and TRL's fused head.",
        "",
        "| what grows | value | time | saved bytes | memory | ours: ms, MB saved, MB | PEFT: ms, MB saved, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, sides in record["rows"].items():
        for value, ratios in sides["ratio"].items():
            cells = [over(ratios[key]) for key in FIGURES[:3]]
            cells += [sides[side][value].get("error") or _figures(sides[side][value]) for side in ("ours", "peft")]
            lines.append(f"| {what} | {value} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(point: dict[str, Any]) -> str:
    units = (1e3, 1e-6, 1e-6)
    values = [(point[key], unit) for key, unit in zip(FIGURES, units, strict=False)]
    return ", ".join("-" if value is None else f"{value * unit:.0f}" for value, unit in values)


def main() -> None:
    """Run the benchmark and write its results."""
    parser = measure.arguments("growth", __doc__)
    parser.add_argument("--grown", nargs="*", choices=GROWN, default=list(GROWN))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    options = measure.chosen(parser, steps=2)
    common = {"dtype": options.dtype, "steps": options.steps}
    found = points(options.grown, options.quick)
    # The same point on several axes is measured once.
    labels = {label(point): point for axis in found.values() for point in axis.values()}
    sides = {
        f"{side} {name}": point | common | {"side": side} for name, point in labels.items() for side in ("ours", "peft")
    }
    samples = interleaved("bench.growth_worker", sides, options.repeats, options.threads, forked)
    record = measure.record("growth", options, samples, settings=SIZE | common, rows=rows_of(found, samples))
    write(options.name, record, table(record))
    picture.growth(record, RESULTS / f"{options.name}.png")


if __name__ == "__main__":
    main()
