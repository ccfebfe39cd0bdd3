"""Which factor of a low-rank adapter should train, and what the factors learn: `python docs/asymmetry.py`.

The study of Zhu et al. 2024 (arXiv:2402.16842) in small, on the shipped decoder and two tasks of the nursery. The grid:
B, A or both train, and the factor that does not start at zero is `rand`, `he` or singular vectors (`svd`), all at one
rank, and B alone also at twice the rank, which is as many parameters as both. The similarities: how alike the spaces of
the factors are to their own start and to one another, over orders of the rows, tasks and starts. An arm's figures are
kept in `docs/asymmetry.json` when it is through, so that an interrupted call goes on with the next; `--again ARM ...`
throws an arm's figures away ("b rand", for example), `--again` alone those of all.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from budget import Work, _loss
from torch import Tensor, nn

import deltaworks as dw
from deltaworks import nursery
from deltaworks.core.operators.low_rank import LowRank
from deltaworks.data.loading import load
from deltaworks.data.preparing import prepare

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "asymmetry.json", HERE / "asymmetry.md"
TASKS, RATES = ("docstrings", "functions"), (5e-4, 2e-3)
SEEDS, STEPS, LENGTH, TRAINED, HELD_OUT, RANK = 4, 40, 80, 96, 48, 8
ORDERS = 3  # of the rows, from the first seed's start
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % points of Student's distribution, by number of seeds
STARTS = {"rand": ("rand", "rand"), "he": ("he", "he"), "svd": ("v", "u")}  # of A; of B where A alone trains
ARMS: dict[str, dict[str, Any]] = {
    f"{train} {start}": {"train": train, **({"b": b} if train == "a" else {"a": a})}
    for train in ("b", "a", "both")
    for start, (a, b) in STARTS.items()
} | {"b rand 2r": {"train": "b", "a": "rand", "rank": 2 * RANK}}
COMPARED = ("both rand", "both he", "both svd", "b rand", "a rand")
ALIKE = {
    "own": "own start",
    "order": "same start and task, other order of rows",
    "task": "same start, other task",
    "start": "other start, same task",
    "all": "other start and task",
}

GRID = (
    "So much comes out of the paper's comparison at this size: B alone, with a random A and half the parameters, does "
    "as well as both on `functions` and 0.05 worse, at the edge of the intervals, on `docstrings`. That A alone is "
    "clearly worse does not come out: it is level with B alone. Nor does twice the rank pay for its parameters: it "
    "fits the trained rows best and has nothing held out to show for it. Gaps can be compared within one rate only: "
    "at the lower one, which both took from every start, they are smaller than those of the one arm of A that took it "
    "too (`he`); of B there is none at that rate. A tiny base, few rows and two rates rank no methods."
)
LEARNT = (
    "Trained A's stay where they started, whatever the task: of one start they all but coincide, of two they are as "
    "far apart as by chance. Trained B's follow the task: from other starts their spaces are alike by 0.24 to 0.31 if "
    "the task is the same and by 0.07 to 0.08 if it is not. Both as the paper found. But what A learns, its change, "
    "follows the task as B does, and so does an A that trains alone, from zero. That A stays near its start says that "
    "it has one, beside which 40 steps are small, not that it learns nothing: by this measure the asymmetry is one of "
    "starts, not of sides. Between other starts cosines vanish in any case, as the components are then others."
)

Run = tuple[str, int, int]
"""The task, the seed of the start and that of the rows' order."""
Factors = dict[str, list[Tensor]]
"""Of every layer: A as rows (`r x in`), its change from the start, and B transposed (`r x out`)."""


class Task(Work):
    """The base with the rows of one task: few enough to train on that they are seen again."""

    def __init__(self, name: str) -> None:
        self.model, tokenizer = nursery.base("decoder")
        made = prepare(load(f"nursery:{name}"), "causal-lm", tokenizer, max_length=LENGTH)
        assert made.validation is not None and made.collator is not None
        self.train: Any = [made.train[i] for i in range(TRAINED)]
        self.collate = collate = made.collator
        out = [made.validation[i] for i in range(HELD_OUT)]
        self.seen, self.held_out = ([collate(rows[i : i + 16]) for i in range(0, HELD_OUT, 16)]
                                    for rows in (self.train[:HELD_OUT], out))  # fmt: skip

    @torch.no_grad()
    def figures(self, model: nn.Module) -> dict[str, float]:
        """Mean loss of a supervised token on held-out rows, how much more that is than on trained ones, and accuracy.

        Accuracy is the share of held-out tokens that are the likeliest given the true ones before.
        """
        model.eval()
        means = []
        for batches in (self.held_out, self.seen):
            total = torch.zeros(3)
            for batch in batches:
                output, labels = model(**batch), batch["labels"][:, 1:]
                number = (labels != -100).sum()
                right = (output.logits[:, :-1].argmax(-1) == labels).sum()
                total += torch.stack([output.loss * number, right, number])
            means.append((total[:2] / total[2]).tolist())
        (loss, accuracy), (seen, _) = means
        return {"loss": loss, "gap": loss - seen, "accuracy": accuracy}


def of(arm: str) -> dw.LoRAAsym:
    """The method of an arm of the grid; alpha is twice the rank."""
    options = {"rank": RANK, **ARMS[arm]}
    return dw.LoRAAsym(**options, alpha=2.0 * options["rank"])


def run(arm: str, task: Task, start: int, order: int, rate: float) -> tuple[dict[str, float], dict[str, Factors]]:
    """One run: its figures, and the factors at the start and in the end."""
    torch.manual_seed(start)
    model, batches = copy.deepcopy(task.model), task.batches(order)
    tuned = dw.attach(model, of(arm), seed=start)
    layers = [part for _, part in tuned.of_kind(LowRank)]
    before = [(part.a.detach().clone(), part.b.detach().clone()) for part in layers]
    optimizer = torch.optim.AdamW(tuned.parameter_groups(rate), weight_decay=0.0)
    rules = tuned.run(STEPS, seed=start, optimizer=optimizer)
    rules.emit("attached")
    model.train()
    for _ in range(STEPS):
        rules.step(partial(_loss, model, next(batches)))
    rules.emit("finished")
    after = [(part.a.detach().clone(), part.b.detach().clone()) for part in layers]
    size = sum(parameter.numel() for parameter in tuned.parameters())
    return task.figures(model) | {"trainable": size}, {
        "start": {"A": [a for a, _ in before], "B": [b.T for _, b in before]},
        "end": {
            "A": [a for a, _ in after],
            "change of A": [a - a0 for (a, _), (a0, _) in zip(after, before, strict=True)],
            "B": [b.T for _, b in after],
        },
    }


def canonical(one: list[Tensor], other: list[Tensor]) -> float:
    """Mean square of the canonical correlations of two row spaces, mean over layers: 1 if they are one space."""
    spaces = [[torch.linalg.qr(factor.T)[0] for factor in factors] for factors in (one, other)]
    return statistics.mean(float((q.T @ p).square().sum() / q.shape[1]) for q, p in zip(*spaces, strict=True))


def cosine(one: list[Tensor], other: list[Tensor]) -> float:
    """Cosine of two matrices taken as vectors, mean over layers."""
    pairs = zip(one, other, strict=True)
    return statistics.mean(float(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)) for x, y in pairs)


def alike(runs: dict[Run, dict[str, Factors]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By measure, factor and kind of pair (`ALIKE`) the similarities of all pairs; what is zero has none."""
    measures: dict[str, Callable[[list[Tensor], list[Tensor]], float]] = {"canonical": canonical, "cosine": cosine}
    pairs = [("own", factors["start"], factors["end"]) for factors in runs.values()]
    for (one, left), (other, right) in itertools.combinations(runs.items(), 2):
        same = one[0] == other[0], one[1] == other[1]
        kind = {(True, True): "order", (False, True): "task", (True, False): "start", (False, False): "all"}[same]
        pairs.append((kind, left["end"], right["end"]))
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (measure, compared), (kind, left, right) in itertools.product(measures.items(), pairs):
        for factor in left.keys() & right.keys():
            if all(x.any() for x in (*left[factor], *right[factor])):
                values = found.setdefault(measure, {}).setdefault(factor, {}).setdefault(kind, [])
                values.append(round(compared(left[factor], right[factor]), 4))
    return found


def about(values: list[float], digits: int = 3) -> str:
    """Mean and 95 % interval of the mean."""
    wide = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {wide:.{digits}f}"


def page(record: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    base = record["base"]
    untouched = "; ".join(f"{task} {base[task]['loss']:.3f}, gap {base[task]['gap']:.3f}, accuracy "
                          f"{base[task]['accuracy']:.3f}" for task in TASKS)  # fmt: skip
    lines = [
        "# Which factor of LoRA trains",
        "",
        f"The shipped decoder ({base['parameters']:,} parameters, float32) with `lora_asym` on all linear layers, rank "
        f"{RANK} (`2r`: {2 * RANK}), alpha twice the rank, {STEPS} steps of 4 of {TRAINED} rows, AdamW without weight "
        f"decay; an arm's rate is that of {' and '.join(f'{rate:g}' for rate in RATES)} which is better on both tasks "
        f"together in one further seed. Mean over {SEEDS} seeds (start and order of the rows) with the 95 % interval "
        f"of the mean. Loss and accuracy are of the tokens of {HELD_OUT} held-out completions, given the true ones "
        f"before; the gap is that loss less that of {HELD_OUT} of the trained rows. The untouched base: {untouched}. "
        "What starts: A, or B where A alone trains; the other is zero. Written by `python docs/asymmetry.py`.",
        "",
        f"| trains | start | trainable | rate | {' | '.join(f'{task}: loss | gap | accuracy' for task in TASKS)} |",
        "|---|---|--:|--:|" + "---|" * (3 * len(TASKS)),
    ]
    for arm in ARMS:
        runs = record["runs"][arm]
        cells = [about([runs[task][str(seed)][name] for seed in range(SEEDS)])
                 for task in TASKS for name in ("loss", "gap", "accuracy")]  # fmt: skip
        train, start = arm.split(" ", 1)
        size = runs[TASKS[0]]["0"]["trainable"]
        trains = train if train == "both" else train.upper()
        lines.append(f"| {trains} | {start} | {size:,} | {record['rates'][arm]['best']:g} | {' | '.join(cells)} |")
    lines += [
        "",
        GRID,
        "",
        "## What the factors learn",
        "",
        "Row spaces of A and column spaces of B (`canonical`: mean square of the canonical correlations, 1 for one "
        f"space, for random ones {RANK} / width, here {base['chance']:.3f}), and the matrices themselves (`cosine`). "
        "Means over layers and over pairs of runs, with the least and the greatest of the pairs. A pair differs in "
        "what its column says (and, where start or task do, in the order of rows, too). The change of A is A less "
        "its start; B starts at zero where it trains, and A where it trains alone.",
        "",
    ]
    for measure in ("canonical", "cosine"):
        lines += [f"| {measure} | factor | {' | '.join(ALIKE.values())} |", "|---|---|" + "---|" * len(ALIKE)]
        for arm in COMPARED:
            train, _, _ = arm.partition(" ")
            for factor in {"b": ["B"], "a": ["A"], "both": ["A", "change of A", "B"]}[train]:
                found = record["alike"][arm][measure][factor]
                cells = [f"{statistics.mean(found[kind]):.2f} ({min(found[kind]):.2f}, {max(found[kind]):.2f})"
                         if found.get(kind) else "" for kind in ALIKE]  # fmt: skip
                lines.append(f"| {arm} | {factor} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, LEARNT, ""])


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", nargs="*")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    empty: dict[str, Any] = {"base": {}, "rates": {}, "runs": {}, "alike": {}}
    record = json.loads(RECORD.read_text()) if RECORD.exists() and options.again != [] else empty
    for arm, kept in itertools.product(options.again or [], ("rates", "runs", "alike")):
        record[kept].pop(arm, None)
    tasks = {name: Task(name) for name in TASKS}
    first = next(iter(tasks.values())).model
    widths = [width for layer in first.modules() if isinstance(layer, nn.Linear) and layer.weight is not
              first.get_input_embeddings().weight for width in layer.weight.shape]  # fmt: skip
    record["base"] = {name: task.figures(task.model) for name, task in tasks.items()} | {
        "parameters": sum(parameter.numel() for parameter in first.parameters()),
        "chance": statistics.mean(RANK / width for width in widths),
    }
    for arm in ARMS:
        pilot = record["rates"].setdefault(arm, {})
        for rate in RATES:
            if str(rate) not in pilot:
                losses = [run(arm, task, SEEDS, SEEDS, rate)[0]["loss"] for task in tasks.values()]
                pilot[str(rate)] = statistics.mean(losses)
        pilot["best"] = min(RATES, key=lambda rate: pilot[str(rate)])
        print(arm, pilot, flush=True)
        factors: dict[Run, dict[str, Factors]] = {}
        compares = arm in COMPARED and arm not in record["alike"]
        drawn = "svd" not in arm  # else all seeds start alike
        for name, seed in itertools.product(TASKS, range(SEEDS)):
            done = record["runs"].setdefault(arm, {}).setdefault(name, {})
            if compares or str(seed) not in done:
                start = seed if drawn else 0
                done[str(seed)], factors[name, start, seed] = run(arm, tasks[name], start, seed, pilot["best"])
                print(arm, name, seed, done[str(seed)], flush=True)
        for name, order in itertools.product(TASKS, range(1, ORDERS)):
            if compares and drawn:
                factors[name, 0, order] = run(arm, tasks[name], 0, order, pilot["best"])[1]
        if compares:
            record["alike"][arm] = alike(factors)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
