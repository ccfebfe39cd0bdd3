"""`make bench ONLY=step`: one training step of every method, over the frozen base, beside PEFT and full fine-tuning."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from .measure import interleaved, machine, median, ratio, write

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 512, "inner": 1408, "layers": 4, "heads": 8, "kv_heads": 4, "vocabulary": 4096},
    "wide": {"hidden": 1024, "inner": 2816, "layers": 2, "heads": 16, "kv_heads": 8, "vocabulary": 4096},
    "llama-3.2-3b": {"hidden": 3072, "inner": 8192, "layers": 28, "heads": 24, "kv_heads": 8, "vocabulary": 128256},
}

# method -> (our settings, PEFT's configuration class and settings), equal in meaning.
COMMON: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "lora": ({"rank": 8, "alpha": 16}, "LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": LINEAR}),
    "dora": (
        {"rank": 8, "alpha": 16},
        "LoraConfig",
        {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": LINEAR},
    ),
    "adalora": (
        {"rank": 12, "target_rank": 8},
        "AdaLoraConfig",
        {"init_r": 12, "target_r": 8, "total_step": 1000, "target_modules": LINEAR},
    ),
    "vera": ({"rank": 256}, "VeraConfig", {"r": 256, "target_modules": LINEAR}),
    "fourierft": ({"count": 1000}, "FourierFTConfig", {"n_frequency": 1000, "target_modules": LINEAR}),
    "c3a": ({"block": 128}, "C3AConfig", {"block_size": 128, "target_modules": LINEAR}),
    "ia3": (
        {},
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "layernorm": ({"which": "all"}, "LNTuningConfig", {}),
    "prompt_tuning": ({"tokens": 20}, "PromptTuningConfig", {"num_virtual_tokens": 20}),
    "prefix_tuning": ({"tokens": 20}, "PrefixTuningConfig", {"num_virtual_tokens": 20}),
}


def sides(shape: dict[str, Any], methods: list[str] | None) -> dict[str, dict[str, Any]]:
    """Every side with what its worker needs."""
    from deltaworks import methods as registry

    found: dict[str, dict[str, Any]] = {"frozen": shape | {"side": "frozen"}, "full": shape | {"side": "full"}}
    for slug, cls in registry().items():
        if (methods and slug not in methods) or cls.needs_data or slug in ("full", "mezo"):
            continue
        ours, config, theirs = COMMON.get(slug, ({}, None, {}))
        found[f"ours {slug}"] = shape | {"side": "ours", "method": slug, "settings": ours}
        if config is not None:
            found[f"peft {slug}"] = shape | {"side": "peft", "config": config, "settings": theirs}
    return found


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record."""
    lines = [
        f"# Training step, {record['shape']}, {record['settings']['dtype']}, batch {record['settings']['batch']} x "
        f"{record['settings']['tokens']} tokens",
        "",
        f"{record['machine']['device']}, {record['threads']} threads, {record['repeats']} repeats, "
        f"{record['machine']['date']}, {record['machine']['versions']}; `{record['command']}`",
        "",
        "Medians over repeats (least to greatest). Time over the frozen base's forward and backward; saved bytes are "
        "what autograd keeps for backward beyond parameters.",
        "",
        "| method | time / frozen | time / full | time / PEFT | saved bytes / PEFT | saved MB |",
        "|---|---|---|---|---|---|",
    ]
    for slug, row in record["rows"].items():
        cells = [_ratio(row.get(key)) for key in ("frozen", "full", "peft", "peft_saved")]
        saved = "failed: " + row["error"] if "error" in row else f"{row['saved_bytes'] / 1e6:.1f}"
        lines.append(f"| {slug} | {' | '.join(cells)} | {saved} |")
    means = record["geometric_mean_over_peft"]
    if means:
        lines += ["", f"Geometric mean of time over PEFT's: {means:.3f}"]
    return "\n".join(lines)


def _ratio(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['median']:.3f} ({value['min']:.2f}-{value['max']:.2f})"


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="step")
    options = parser.parse_args()
    settings = SHAPES[options.shape] | {
        key: getattr(options, key) for key in ("steps", "batch", "tokens", "dtype")
    }
    samples = interleaved("bench.step_worker", sides(settings, options.methods), options.repeats, options.threads)
    rows: dict[str, Any] = {}
    for name in samples:
        kind, _, slug = name.partition(" ")
        if kind not in ("ours", "full"):
            continue
        mine = samples[name]
        row: dict[str, Any] = {"frozen": ratio(mine, samples["frozen"], "seconds"), "seconds": median(mine, "seconds")}
        if "error" in mine[0]:
            row["error"] = mine[0]["error"]
        else:
            row["saved_bytes"] = median(mine, "saved_bytes")
            row["resident_above_base"] = median(mine, "resident_above_base")
        if kind == "ours":
            row["full"] = ratio(mine, samples["full"], "seconds")
            if f"peft {slug}" in samples:
                theirs = samples[f"peft {slug}"]
                row["peft"], row["peft_saved"] = ratio(mine, theirs, "seconds"), ratio(mine, theirs, "saved_bytes")
                row["peft_resident"] = ratio(mine, theirs, "resident_above_base")
                if "error" in theirs[0]:
                    row["peft_error"] = theirs[0]["error"]
        rows[slug or "full"] = row
    over = [row["peft"]["median"] for row in rows.values() if row.get("peft")]
    record = {
        "command": " ".join(["python -m bench.step", *sys.argv[1:]]),
        "machine": machine(),
        "shape": options.shape,
        "settings": settings,
        "threads": options.threads,
        "repeats": options.repeats,
        "rows": rows,
        "geometric_mean_over_peft": math.exp(sum(map(math.log, over)) / len(over)) if over else None,
        "samples": samples,
    }
    write(options.name, record, table(record))


if __name__ == "__main__":
    main()
