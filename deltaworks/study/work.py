"""What a trial does in its process: run the recipe, and measure what a study wants to know."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from .. import adapters
from ..core.tuned import base_size
from ..data import Prepared, epoch_order, load, prepare
from ..nursery import PREFIX, corpus
from ..training.evaluation import IGNORED, held_out, samples
from ..training.recipe import Recipe
from ..training.tune import Opened, Progress, open_run, tune
from .fairness import Groups, groups_of
from .flops import Flops
from .rows import Row
from .scores import scores
from .trial import Half, Trial

LIBRARY = "nursery:library"
"""The held-out part of what the nursery's text bases were trained on, as a domain."""
DOMAIN_ROWS, DOMAIN_TOKENS, DOMAIN_LETTERS = 48, 256, 1500
LOOKED_AT = 8  # held-out examples of which the forward pass is counted


def perform(trial: Trial, folder: Path, tell: Progress = lambda event, **figures: None) -> Row:
    """Run a trial in this process.

    Args:
        trial: what to run.
        folder: where the run is; one that was stopped there goes on.
        tell: hears the events of `tune`; what it raises stops the trial.

    Returns:
        Plain values: `task`, `figures` (held out: loss, merit, scores of generated texts), `before` (the same of the
        base), `trainable`, `total`, `stored_bytes`, `kept` (values in the artifact), `peak_memory_bytes`, `steps`,
        `step_seconds` (median), `step_flops`, `example_flops` (a forward pass), `losses`, `evaluations`,
        `domain_before`, `domain_after`, `samples`, `device`, `machine`. What does not apply is None.

    Raises:
        ValueError, OSError: as `tune`.
    """
    recipe = dataclasses.replace(trial.recipe, output=str(folder)).complete()
    whole = open_run(recipe, tell)
    opened = _halved(whole, trial.half)
    groups = _groups(trial, whole, recipe)
    domain = _domain(trial.domain, opened, recipe) if trial.domain else None

    def on_domain() -> float | None:
        if domain is None:
            return None
        return held_out(opened.model, domain, recipe.batch_size, opened.device)["loss"]

    domain_before = on_domain()
    common = {
        "task": opened.task,
        "total": base_size(opened.model),
        "rows": len(opened.prepared.train),
        "held_out": len(opened.prepared.validation or ()),
        "device": opened.device.type,
        "machine": f"{platform.machine()}, {platform.system()}",
        "domain_before": domain_before,
    }
    if trial.kind != "tune":
        return common | _untrained(trial, recipe, opened) | {"domain_after": domain_before}

    def heard(event: str, **figures: Any) -> None:
        if event == "evaluated" and groups is not None:
            figures["figures"] = figures["figures"] | groups.figures(opened, recipe.batch_size)
        tell(event, **figures)

    watch = _Watch(heard)
    try:
        result = tune(recipe, resume=folder.exists(), progress=watch.hear, opened=opened)
    finally:
        watch.counted()
    metrics = result.metrics
    made = metrics["samples"]
    if groups is not None and result.tuned is None:
        adapters.load(opened.model, result.adapter)  # it was finished before this process began
    by_group = groups.figures(opened, recipe.batch_size, intervals=True) if groups is not None else {}
    return common | {
        "figures": (metrics["after"] or {}) | scores(made["after"], execute=trial.execute) | by_group,
        "before": (metrics["before"] or {}) | scores(made["before"], execute=trial.execute),
        "trainable": metrics["adapter"]["trainable"],
        "stored_bytes": metrics["adapter"]["stored_bytes"],
        "kept": adapters.inspect(result.adapter)["values"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "steps": metrics["steps"],
        "step_seconds": watch.median(),
        "step_flops": watch.flops.total or None,
        "example_flops": _example_flops(opened, opened.prepared),
        "losses": metrics["losses"],
        "evaluations": metrics["evaluations"],
        "domain_after": on_domain() if result.tuned is not None else None,
        "samples": made["after"],
        "mergeable": recipe.made().mergeable,
    }


class _Watch:
    """Takes the time of each step but the first, and counts the operations of the first."""

    def __init__(self, tell: Progress) -> None:
        self.tell, self.flops = tell, Flops()
        self.last: float | None = None
        self.times: list[float] = []
        self.counting = False

    def hear(self, event: str, **figures: Any) -> None:
        now = time.perf_counter()
        if event == "step":
            self.counted()
            if self.last is not None:
                self.times.append(now - self.last)
        self.tell(event, **figures)
        if event == "before":
            self.flops.__enter__()
            self.counting = True
        # Evaluations and checkpoints are told of after the step: their time counts for none.
        if event in ("step", "evaluated", "saved"):
            self.last = time.perf_counter()

    def counted(self) -> None:
        """End counting."""
        if self.counting:
            self.flops.__exit__(None, None, None)
            self.counting = False

    def median(self) -> float | None:
        return statistics.median(self.times) if self.times else None


def _groups(trial: Trial, whole: Opened, recipe: Recipe) -> Groups | None:
    """The groups of those held-out rows that a trial looks at."""
    if trial.groups is None:
        return None
    found = groups_of(whole, recipe, trial.groups)
    return found.half(_chosen(trial.half, len(found.names)))


def _chosen(half: Half | None, count: int) -> range:
    """Numbers of the held-out rows of a half."""
    if half is None or count < 2:
        return range(count)
    return range(0 if half == "choosing" else 1, count, 2)


def _halved(opened: Opened, half: Half | None) -> Opened:
    """The run with every other held-out row only."""
    rows = opened.prepared.validation
    if half is None or rows is None or len(rows) < 2:
        return opened
    chosen = rows.select(_chosen(half, len(rows)))
    return dataclasses.replace(opened, prepared=dataclasses.replace(opened.prepared, validation=chosen))


def _domain(source: str, opened: Opened, recipe: Recipe) -> Prepared:
    """Text of the base's own domain, held out as a whole.

    Raises:
        ValueError: when the task's model does not predict text.
    """
    if opened.task not in ("causal-lm", "masked-lm", "seq2seq", "multiple-choice"):
        raise ValueError(
            f"domain={source!r}: forgetting is a language model's loss, which a model for {opened.task} does not have"
        )
    texts: Any = source
    if source == LIBRARY:
        found = corpus.documents("validation")
        picked = found[:: max(1, len(found) // DOMAIN_ROWS)][:DOMAIN_ROWS]
        texts = [{"text": document.text[:DOMAIN_LETTERS]} for document in picked]
    rows = load(texts, validation=0, limit=DOMAIN_ROWS)
    length = min(recipe.max_length or DOMAIN_TOKENS, DOMAIN_TOKENS)
    whole = dataclasses.replace(rows, train=rows.train.select(range(1)), validation=rows.train, places={})
    task = "causal-lm" if opened.task == "multiple-choice" else opened.task
    return prepare(
        whole, task, opened.processor, max_length=length, completion_only=False, seed=0,
        mask_probability=recipe.mask,
    )  # fmt: skip


def _untrained(trial: Trial, recipe: Recipe, opened: Opened) -> Row:
    """The base as it is, or with training examples in its prompt."""
    prepared = opened.prepared
    if prepared.validation is None:
        raise ValueError(f"{recipe.data}: nothing is held out to look at; give validation a share, a file or a split")
    if trial.kind == "context":
        prepared = _with_examples(trial, recipe, opened)
    opened.memory.forget()
    figures = held_out(opened.model, prepared, recipe.batch_size, opened.device)
    peak = opened.memory.bytes()
    made = samples(opened.model, prepared, opened.processor, recipe.samples, recipe.sample_length, opened.device)
    return {
        "figures": figures | scores(made, execute=trial.execute),
        "before": None,
        "trainable": 0,
        "stored_bytes": 0,
        "peak_memory_bytes": peak,
        "steps": 0,
        "step_seconds": None,
        "step_flops": None,
        "example_flops": _example_flops(opened, prepared),
        "losses": [],
        "evaluations": [],
        "samples": made,
        "mergeable": True,
    }


def _with_examples(trial: Trial, recipe: Recipe, opened: Opened) -> Prepared:
    """Held-out rows with training examples in front, the same for each row, as many as the base can read.

    Raises:
        ValueError: for another task than causal-lm, and where not even one example fits.
    """
    prepared, model = opened.prepared, opened.model
    if opened.task not in ("causal-lm", "multiple-choice") or prepared.packed:
        what = "packed rows" if prepared.packed else opened.task
        raise ValueError(f"in-context examples go with causal-lm, one example a row, and choices; this is {what}")
    assert prepared.validation is not None
    order = epoch_order(len(prepared.train), recipe.seed, 0)[: trial.context]
    examples = [_solved(prepared.train[index]) for index in order]
    first = getattr(opened.processor, "bos_token_id", None)
    room = getattr(model.config, "max_position_embeddings", None)
    rows, most = [], 0
    for row in prepared.validation:
        parts = list(_sequences(row))  # type: ignore[arg-type]
        shown = list(examples)
        while shown and room is not None and sum(map(len, shown)) + max(len(ids) for ids, _ in parts) > room:
            shown.pop()
        most = max(most, len(shown))
        front = [token for number, one in enumerate(shown) for token in _continued(one, first, number > 0)]
        made: dict[str, Any] = {"input_ids": [], "labels": [], "lengths": [], "answer": row.get("answer")}  # type: ignore[attr-defined]
        for ids, labels in parts:
            rest = _continued(ids, first, bool(shown))
            targets = labels[len(ids) - len(rest) :]
            if shown:
                targets[0] = IGNORED if len(targets) > 1 else targets[0]
            made["input_ids"] += front + rest
            made["labels"] += [IGNORED] * len(front) + targets
            made["lengths"].append(len(front) + len(rest))
        rows.append(made | {"attention_mask": [1] * len(made["input_ids"])})
    if not most:
        raise ValueError(f"in-context examples: not one fits beside a row into the {room} tokens that the base reads")
    kept = [{name: value for name, value in row.items() if name in prepared.validation.column_names} for row in rows]
    return dataclasses.replace(prepared, validation=Dataset.from_list(kept))


def _sequences(row: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels of what the model reads of a row: one sequence, or one for each choice."""
    start = 0
    for length in row.get("lengths") or [len(row["input_ids"])]:
        yield list(row["input_ids"][start : start + length]), list(row["labels"][start : start + length])
        start += length


def _solved(row: dict[str, Any]) -> list[int]:
    """A training row as an example: of choices the prompt with the right one."""
    return list(_sequences(row))[row.get("answer") or 0][0]


def _continued(ids: list[int], first: int | None, inside: bool) -> list[int]:
    """A sequence without its beginning-of-text mark, where it stands inside another."""
    return ids[1:] if inside and ids and ids[0] == first else ids


def _example_flops(opened: Opened, prepared: Prepared) -> float | None:
    """Operations of a forward pass for one held-out example."""
    rows = prepared.validation
    if rows is None:
        return None
    few = rows.select(range(min(LOOKED_AT, len(rows))))
    with Flops() as flops:
        held_out(opened.model, prepared, len(few), opened.device, few)
    return flops.total / len(few)


def library(base: str) -> str | None:
    """The domain of a base that we know it of: the nursery's text bases were trained on the standard library."""
    texts = ("decoder", "decoder-xs", "decoder-s", "decoder-m", "moe", "ssm", "encoder")
    return LIBRARY if base.startswith(PREFIX) and base.removeprefix(PREFIX) in texts else None
