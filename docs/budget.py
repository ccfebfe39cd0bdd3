"""What every weight delta costs and gains on one base, as a table: `python docs/budget.py`.

The base is the shipped decoder, the task its docstrings: 20 steps of 4 rows, every method at its own defaults and its
own learning rate, rank 8 where the default is more, the same rows in the same order for all methods of a seed. The
loss is that of the same held-out completions. Each run's figures are kept in `docs/budget.json` as they come, so that
an interrupted call goes on where it stopped; `--again SLUG ...` throws a method's figures away, `--again` alone those
of every method's first seed, with which costs are measured; `--costs` measures only those again, but for the stored
bytes, which a run must end for.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deltaworks as dw
from deltaworks import nursery
from deltaworks.core.costs import saved_bytes
from deltaworks.data.loading import load
from deltaworks.data.preparing import prepare

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "budget.json", HERE / "budget.md"
FAMILIES = ("lowrank", "structured", "adaptive", "fullparam")
SEEDS, STEPS, ROWS, LENGTH, HELD_OUT = 5, 20, 4, 96, 48
STUDENT = 2.776  # 97.5 % point of Student's distribution with four degrees of freedom, for five seeds


class Work:
    """The base, the training rows and the held-out rows."""

    def __init__(self) -> None:
        self.model, tokenizer = nursery.base("decoder")
        made = prepare(load("nursery:docstrings"), "causal-lm", tokenizer, max_length=LENGTH)
        assert made.validation is not None
        self.train, self.collate = made.train, made.collator
        rows = [made.validation[i] for i in range(HELD_OUT)]
        self.held_out = [self.collate(rows[i : i + 16]) for i in range(0, HELD_OUT, 16)]

    def batches(self, seed: int) -> Iterator[dict[str, Any]]:
        """Endless training batches in the order of a seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for start in range(0, len(order) - ROWS + 1, ROWS):
                yield self.collate([self.train[i] for i in order[start : start + ROWS]])

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean held-out loss of a supervised token."""
        model.eval()
        total, count = 0.0, 0
        for batch in self.held_out:
            number = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**batch).loss) * number, count + number
        return total / count


def of(slug: str) -> Any:
    """The method at its defaults, at rank 8 where it has a rank, without dropout."""
    fields = {field.name: field.default for field in dataclasses.fields(dw.methods()[slug])}
    chosen: dict[str, Any] = {"rank": 8} if isinstance(fields.get("rank"), int) and fields["rank"] > 8 else {}
    return dw.method(slug, **chosen, **({"dropout": 0.0} if "dropout" in fields else {}))


def begun(slug: str, seed: int, work: Work) -> tuple[nn.Module, Any]:
    """A copy of the base with the method attached."""
    torch.manual_seed(seed)
    model, method = copy.deepcopy(work.model), of(slug)
    data = [next(work.batches(1000 + seed)) for _ in range(2)] if method.needs_data else None
    return model, dw.attach(model, method, data=data, seed=seed)


def run(slug: str, seed: int, work: Work) -> dict[str, Any]:
    """One run: final loss, and for the first seed what the method costs."""
    model, tuned = begun(slug, seed, work)
    batches = work.batches(seed)
    result = costs(model, tuned, work) if seed == 0 else {}
    optimizer = torch.optim.AdamW(tuned.parameter_groups(tuned.method.default_lr))
    rules = tuned.run(STEPS, seed=seed, optimizer=optimizer)
    rules.emit("attached")
    model.train()
    for _ in range(STEPS):
        rules.step(partial(_loss, model, next(batches)))
    rules.emit("finished")
    if seed == 0:
        result["stored"] = stored(model)
    return result | {"loss": work.loss(model)}


def _loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).loss


def costs(model: nn.Module, tuned: Any, work: Work) -> dict[str, Any]:
    """Parameters, and bytes kept for backward per token beyond the frozen base's, as training begins."""
    batch = next(work.batches(0))
    frozen = copy.deepcopy(work.model).requires_grad_(False)
    embedded = frozen.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    tokens = batch["input_ids"].numel()
    below = saved_bytes(frozen, lambda: frozen(inputs_embeds=embedded, **rest).loss)
    model.train()
    forward_only = any(rule.owns_step for rule in tuned.rules)
    above = 0 if forward_only else saved_bytes(model, lambda: model(**batch).loss)
    return {
        "trainable": sum(parameter.numel() for parameter in tuned.parameters()),
        "saved_per_token": (above - below) / tokens,
    }


def stored(model: nn.Module) -> int:
    """Bytes of the finished adapter's tensors on disk."""
    with tempfile.TemporaryDirectory() as folder:
        dw.save(model, folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def page(record: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Weight deltas on one base",
        "",
        f"The shipped decoder ({record['base']['parameters']:,} parameters, float32), {STEPS} steps of {ROWS} rows of "
        f"its docstrings, every method at its own defaults and learning rate, at rank 8 if by default above, "
        f"without dropout. Loss: of {HELD_OUT} held-out completions after training, mean over {SEEDS} seeds with the "
        f"95 % interval of the mean; the untouched base has {record['base']['loss']:.3f}. Trainable: values that train "
        "when training begins; stored: the finished adapter's tensors. Saved: bytes that autograd "
        "keeps for backward, per token, beyond what it keeps for the frozen base (below zero: the method needs no "
        "gradient in the first layers). Written by `python docs/budget.py`.",
        "",
        "So few steps at one learning rate rank neither methods nor papers: the table says what each costs, and that "
        "it learns. FourierFT's loss is above the base's because its coefficients do not begin at zero, at a scale "
        "meant for layers of 768 and more; on this base, 256 wide, it begins at 8.8.",
        "",
    ]
    for family in FAMILIES:
        lines += [f"## {family}", ""]
        lines += [
            "| method | trainable | stored bytes | saved bytes / token | merges | loss |",
            "|---|--:|--:|--:|---|---|",
        ]
        for slug, cls in dw.methods().items():
            runs = record["runs"].get(slug, {})
            if cls.family != family or "0" not in runs:
                continue
            losses = [runs[seed]["loss"] for seed in sorted(runs)]
            first, mean = runs["0"], statistics.mean(losses)
            about = STUDENT * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) == SEEDS else math.nan
            merges = "yes" if cls.mergeable else "no"
            lines.append(
                f"| {slug} | {first['trainable']:,} | {first['stored']:,} | {first['saved_per_token']:,.0f} | {merges} "
                f"| {mean:.3f} ± {about:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", nargs="*")
    parser.add_argument("--costs", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": {}}
    for slug in options.again or []:
        record["runs"].pop(slug, None)
    for runs in record["runs"].values() if options.again == [] else ():
        runs.pop("0", None)
    work = Work()
    size = sum(parameter.numel() for parameter in work.model.parameters())
    record["base"] = {"parameters": size, "loss": work.loss(work.model)}
    slugs = [slug for slug, cls in dw.methods().items() if cls.family in FAMILIES]
    for seed in range(SEEDS):
        for slug in slugs:
            if str(seed) not in record["runs"].setdefault(slug, {}):
                record["runs"][slug][str(seed)] = run(slug, seed, work)
                print(slug, seed, record["runs"][slug][str(seed)], flush=True)
                RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if options.costs:
        for slug in slugs:
            record["runs"][slug]["0"] |= costs(*begun(slug, 0, work), work)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
