"""`make bench ONLY=step`: one training step of every method, over the frozen base, beside PEFT and full fine-tuning."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from . import measure, picture
from .measure import RESULTS, forked, interleaved, median, nearest, ratio, write

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm"]
# Widths and depths of the base, then the batch.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 512, "inner": 1408, "layers": 4, "heads": 8, "kv_heads": 4, "vocabulary": 4096},
    "wide": {"hidden": 1024, "inner": 2816, "layers": 2, "heads": 16, "kv_heads": 8, "vocabulary": 4096},
    "llama-1b-block": {"hidden": 2048, "inner": 8192, "layers": 1, "heads": 32, "kv_heads": 8, "vocabulary": 4096},
    "llama-3.2-3b": {"hidden": 3072, "inner": 8192, "layers": 28, "heads": 24, "kv_heads": 8, "vocabulary": 128256},
}

# method -> (our settings, PEFT's configuration class, its settings), equal in meaning.
Pair = tuple[dict[str, Any], str, dict[str, Any]]
COMMON: dict[str, Pair] = {
    "lora": ({"rank": 8, "alpha": 16}, "LoraConfig", {"r": 8, "lora_alpha": 16}),
    "rslora": ({"rank": 8, "alpha": 16}, "LoraConfig", {"r": 8, "lora_alpha": 16, "use_rslora": True}),
    "dora": ({"rank": 8, "alpha": 16}, "LoraConfig", {"r": 8, "lora_alpha": 16, "use_dora": True}),
    "pissa": (
        {"rank": 8, "alpha": 16},
        "LoraConfig",
        {"r": 8, "lora_alpha": 16, "init_lora_weights": "pissa_niter_4"},
    ),
    "olora": ({"rank": 8, "alpha": 16}, "LoraConfig", {"r": 8, "lora_alpha": 16, "init_lora_weights": "olora"}),
    "adalora": (
        {"init_rank": 12, "target_rank": 8},
        "AdaLoraConfig",
        {"init_r": 12, "target_r": 8, "total_step": 1000, "tinit": 150, "tfinal": 450},
    ),
    "vera": ({"rank": 256}, "VeraConfig", {"r": 256}),
    "randlora": ({"rank": 32}, "RandLoraConfig", {"r": 32}),
    "vb_lora": (
        {"vectors": 90, "length": 128},
        "VBLoRAConfig",
        {"r": 4, "num_vectors": 90, "vector_length": 128},
    ),
    "miss": ({"rank": 64}, "MissConfig", {"r": 64}),
    "bone_bat": ({"rank": 64}, "MissConfig", {"r": 64, "init_weights": "bat"}),
    "glora": ({"rank": 4}, "GloraConfig", {"r": 4}),
    "fourierft": ({"n": 1000}, "FourierFTConfig", {"n_frequency": 1000}),
    "c3a": ({"block": 128}, "C3AConfig", {"block_size": 128}),
    "oft": ({"block": 32}, "OFTConfig", {"oft_block_size": 32}),
    "boft": ({"block": 4}, "BOFTConfig", {"boft_block_size": 4}),
    "hra": ({"rank": 8}, "HRAConfig", {"r": 8}),
    "loha": ({"rank": 8}, "LoHaConfig", {"r": 8}),
    "lokr": ({"rank": 8}, "LoKrConfig", {"r": 8}),
    "ia3": (
        {},
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "layernorm": ({"on": ["attention.norm", "mlp.norm"]}, "LNTuningConfig", {"target_modules": NORMS}),
    "prompt_tuning": ({"length": 20}, "PromptTuningConfig", {"num_virtual_tokens": 20}),
    "prefix_tuning": (
        {"length": 20},
        "PrefixTuningConfig",
        {"num_virtual_tokens": 20, "prefix_projection": True, "encoder_hidden_size": 512},
    ),
}
# Of those of equal meaning in LyCORIS: its settings. Its DoRA fails in bfloat16, its BOFT on an inner width of 2816.
LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {"network_module": "lora", "lora_dim": 8, "alpha": 16},
    "loha": {"network_module": "loha", "lora_dim": 8, "alpha": 8},
    "lokr": {"network_module": "lokr", "lora_dim": 8, "alpha": 8},
    "oft": {"network_module": "diag-oft", "lora_dim": 32},
    "krona": {"network_module": "lokr", "full_matrix": True, "factor": -1},
    "diffusekrona": {"network_module": "lokr", "full_matrix": True, "factor": 8},
}
# Methods that PEFT does not have and whose papers take higher ranks: measured at LoRA's. All others at their defaults,
# without dropout.
RANKED = ("inttune", "loldu", "mtlora", "nlora", "qlora", "qr_lora", "slora_structured", "switchlora")
# LISA draws two blocks of a deep model; of one of two blocks that is all of it.
LIGHT: dict[str, dict[str, Any]] = {slug: {"rank": 8} for slug in RANKED} | {"lisa": {"layers": 1}}
# LyCORIS takes one factor for both sides of a layer; of KronA it puts the smaller sides first in both.
LIGHT["diffusekrona"] = {"rows": 8, "columns": 8}
UNTARGETED = ("PromptTuningConfig", "PrefixTuningConfig")
# LoRA once more: with the loss as `deltaworks tune` computes it, without logits, and beside a PEFT whose factors are
# stored in the base's dtype, where by default they are float32 and the activations are cast to it.
LEAN_LOSS, LOW = "lora, loss without logits", "lora, factors in the base's dtype"


def sides(shape: dict[str, Any], methods: list[str] | None, alone: bool = False) -> dict[str, dict[str, Any]]:
    """Every side with what its worker needs; `alone` leaves out those of other libraries."""
    from deltaworks import methods as registry

    found: dict[str, dict[str, Any]] = {"frozen": shape | {"side": "frozen"}, "full": shape | {"side": "full"}}
    unknown = sorted(set(methods or ()) - set(registry()))
    if unknown:
        raise SystemExit(f"bench: there is no method {unknown[0]!r}")
    for slug, cls in registry().items():
        if (methods and slug not in methods) or slug == "full":
            continue
        ours, config, theirs = COMMON.get(slug, (LIGHT.get(slug, {}), "", {}))
        if "dropout" in {field.name for field in dataclasses.fields(cls)}:
            ours = {"dropout": 0.0} | ours
        found[f"ours {slug}"] = shape | {"side": "ours", "method": slug, "settings": ours}
        if config:
            targets = {} if config in UNTARGETED else {"target_modules": LINEAR}
            found[f"peft {slug}"] = shape | {"side": "peft", "config": config, "settings": targets | theirs}
        if slug in LYCORIS:
            targets = LINEAR[:4] if slug == "diffusekrona" else LINEAR
            found[f"lycoris {slug}"] = shape | {"side": "lycoris", "settings": LYCORIS[slug], "targets": targets}
    if "ours lora" in found:
        found[f"ours {LEAN_LOSS}"] = found["ours lora"] | {"loss": "tune"}
        if not alone:
            found[f"ours {LOW}"], found[f"peft {LOW}"] = found["ours lora"], found["peft lora"] | {"low": True}
    return {name: side for name, side in found.items() if not (alone and name.startswith(("peft ", "lycoris ")))}


def rows(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row a method: figures, and ratios repeat by repeat."""
    found: dict[str, Any] = {}
    for name, mine in samples.items():
        kind, _, slug = name.partition(" ")
        if kind not in ("ours", "full"):
            continue
        frozen = nearest(mine, samples["frozen"])
        row: dict[str, Any] = {"frozen": ratio(mine, frozen, "seconds"), "seconds": median(mine, "seconds")}
        if "error" in mine[0]:
            row["error"] = mine[0]["error"]
        for figure in ("saved_bytes", "resident_above_base", "trainable", "cuda_peak"):
            row[figure] = median(mine, figure)
        if kind == "ours":
            for figure, key in (
                ("seconds", "full"),
                ("saved_bytes", "full_saved"),
                ("resident_above_base", "full_rss"),
            ):
                row[key] = ratio(mine, nearest(mine, samples["full"]), figure)
            theirs = samples.get("peft lora" if slug == LEAN_LOSS else f"peft {slug}")
            if theirs is not None:
                row["peft_frozen"] = ratio(theirs, nearest(theirs, samples["frozen"]), "seconds")
                row["peft"], row["peft_saved"] = ratio(mine, theirs, "seconds"), ratio(mine, theirs, "saved_bytes")
                row["peft_resident"] = ratio(mine, theirs, "resident_above_base")
                row["peft_error"] = theirs[0].get("error")
            others = samples.get(f"lycoris {slug}")
            if others is not None:
                row["lycoris"] = ratio(mine, others, "seconds")
                row["lycoris_saved"] = ratio(mine, others, "saved_bytes")
        found[slug or "full"] = row
    return found


COLUMNS = {
    "time / frozen": "frozen",
    "time / full": "full",
    "time / PEFT": "peft",
    "saved / PEFT": "peft_saved",
    "resident / PEFT": "peft_resident",
    "time / LyCORIS": "lycoris",
    "saved / full": "full_saved",
    "resident / full": "full_rss",
}


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record."""
    shape = record["settings"]
    found = {key for row in record["rows"].values() for key, value in row.items() if value is not None}
    found |= {"peft"} if "peft_error" in found else set()
    columns = {title: key for title, key in COLUMNS.items() if key in found}
    lines = [
        f"# Training step, {record['shape']}: {shape['layers']} layers, {shape['hidden']} wide, {shape['dtype']}, "
        f"batch {shape['batch']} x {shape['tokens']} tokens",
        "",
        f"{record['machine']['device']}, {record['threads']} threads, {record['repeats']} repeats, "
        f"{record['machine']['date']}, {record['machine']['versions']}; `{record['command']}`",
        "",
        "Medians over repeats (least to greatest), over the frozen base and full fine-tuning as measured nearest in "
        "time. Time over the frozen base's forward and backward; saved bytes are what autograd keeps for backward "
        "beyond parameters; resident is the most memory above that of the loaded base. On CPUs the C library "
        + ("keeps what a step frees, as while `tune` trains." if shape.get("freed") == "kept" else "is left as it is."),
        "",
        f"| method | {' | '.join(columns)} | saved MB |",
        f"|---|{'---|' * len(columns)}---|",
    ]
    for slug, row in record["rows"].items():
        cells = {key: _ratio(row.get(key)) for key in columns.values()}
        if row.get("peft_error"):
            cells["peft"] = f"PEFT failed: {row['peft_error']}"
        saved = f"failed: {row['error']}" if "error" in row else f"{(row['saved_bytes'] or 0) / 1e6:.1f}"
        lines.append(f"| {slug} | {' | '.join(cells.values())} | {saved} |")
    for name, mean in record["geometric_means"].items():
        lines += ["", f"Geometric mean of {name}: {mean:.3f}"]
    return "\n".join(lines)


def _ratio(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['median']:.3f} ({value['min']:.2f}-{value['max']:.2f})"


def _mean(found: dict[str, Any], key: str) -> float | None:
    # The loss without logits is LoRA once more, with something that PEFT has no counterpart of.
    values = [row[key]["median"] for slug, row in found.items() if row.get(key) and slug != LEAN_LOSS]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def main() -> None:
    """Run the benchmark and write its results."""
    parser = measure.arguments("step", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--alone", action="store_true", help="without PEFT's and LyCORIS's sides")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warm", type=int, default=1, help="steps before those that are measured")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    freed = "whether the C library keeps what a step frees, as while `tune` trains, on every side"
    parser.add_argument("--freed", choices=("kept", "returned"), default="kept", help=freed)
    options = measure.chosen(parser, methods=["lora"], tokens=128)
    names = ("steps", "warm", "batch", "tokens", "dtype", "freed")
    settings = SHAPES[options.shape] | {name: getattr(options, name) for name in names}
    settings |= {"layers": options.layers} if options.layers else {}
    chosen = sides(settings, options.methods, options.alone)
    references = ("frozen", "full")
    samples = interleaved("bench.step_worker", chosen, options.repeats, options.threads, forked, references)
    found = rows(samples)
    means = {"time over PEFT's": _mean(found, "peft"), "saved bytes over PEFT's": _mean(found, "peft_saved")}
    means = {name: mean for name, mean in means.items() if mean is not None}
    record = measure.record(
        "step", options, samples, shape=options.shape, settings=settings, rows=found, geometric_means=means
    )
    write(options.name, record, table(record))
    picture.step(record, RESULTS / f"{options.name}.png")


if __name__ == "__main__":
    main()
