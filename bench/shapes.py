"""`make bench ONLY=shapes`: LoRA's step over the frozen base's, PEFT's and full fine-tuning's, on several bases."""

from __future__ import annotations

from typing import Any

from . import measure, picture
from .measure import RESULTS, forked, heading, interleaved, over, write
from .step import LEAN_LOSS, SHAPES, rows, sides

# The base and its batch: examples, tokens of each.
CASES: tuple[tuple[str, int, int], ...] = (
    ("small", 1, 64), ("small", 16, 128), ("wide", 4, 128), ("wide", 16, 128), ("wide", 16, 512),
    ("llama-1b-block", 16, 128),
)  # fmt: skip
SIDES = ("frozen", "full", "ours lora", "peft lora", f"ours {LEAN_LOSS}")
COLUMNS = {
    "time / frozen": "frozen",
    "PEFT's / frozen": "peft_frozen",
    "time / full": "full",
    "time / PEFT": "peft",
    "saved / PEFT": "peft_saved",
    "resident / PEFT": "peft_resident",
    "saved / full": "full_saved",
    "resident / full": "full_rss",
}


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Label -> settings of a case."""
    chosen = CASES[:1] if quick else CASES
    found = {}
    for shape, batch, tokens in chosen:
        settings = SHAPES[shape] | {"batch": batch, "tokens": tokens, "dtype": "bfloat16", "steps": 2 if quick else 4}
        label = f"{shape}: {settings['layers']} x {settings['hidden']} wide, {batch} x {tokens} tokens"
        found[label] = settings
    return found


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record."""
    lines = heading("LoRA's training step on several bases and batches", record)
    lines += [
        "Rank 8 on all linear layers of a Llama in bfloat16. Medians over repeats (least to greatest). Time over the "
        "frozen base's forward and backward; saved bytes are what autograd keeps for backward beyond parameters.",
        "",
        f"| base and batch | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for label, found in record["rows"].items():
        for slug in ("lora", LEAN_LOSS):
            cells = [over(found[slug].get(key)) for key in COLUMNS.values()]
            lines.append(f"| {label}{'' if slug == 'lora' else ', loss without logits'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and write its results."""
    options = measure.chosen(measure.arguments("shapes", __doc__))
    chosen = {
        label: {name: one for name, one in sides(settings, ["lora"]).items() if name in SIDES}
        for label, settings in cases(options.quick).items()
    }
    flat = {f"{name} @ {label}": one for label, part in chosen.items() for name, one in part.items()}
    taken = interleaved("bench.step_worker", flat, options.repeats, options.threads, forked)
    found = {label: rows({name: taken[f"{name} @ {label}"] for name in part}) for label, part in chosen.items()}
    record = measure.record("shapes", options, taken, rows=found)
    write(options.name, record, table(record))
    picture.shapes(record, RESULTS / f"{options.name}.png")


if __name__ == "__main__":
    main()
