"""Held-out loss, figures of merit and generated samples: how good a model is, independent of how batches are made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data import Labels, Prepared
from ..data.lengths import costs
from .choices import choose
from .head import causal_loss

IGNORED = -100
GENERATIVE = ("causal-lm", "seq2seq")


def batches(data: Dataset, collator: Any, size: int, device: torch.device | str) -> Iterator[dict[str, Any]]:
    """Batches of a data set in its own order, as the model is called."""
    for start in range(0, len(data), size):
        batch = collator([data[index] for index in range(start, min(start + size, len(data)))])
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def by_length(data: Dataset, collator: Any, size: int, device: torch.device | str) -> Iterator[dict[str, Any]]:
    """Batches of rows of like length, the longest first; of short rows more, until they cost what the longest do.

    So a batch needs no more than `size` of the longest rows, which training must be able to take anyway.
    """
    found = costs(data)
    if not found:
        yield from batches(data, collator, size, device)
        return
    order = sorted(range(len(data)), key=lambda index: -found[index])
    start, most = 0, size * found[order[0]]
    while start < len(order):
        rows = order[start : start + max(1, most // max(1, found[order[start]]))]
        yield from batches(data.select(rows), collator, len(rows), device)
        start += len(rows)


@torch.no_grad()
def held_out(
    model: nn.Module, prepared: Prepared, batch_size: int, device: torch.device | str, data: Dataset | None = None
) -> dict[str, float]:
    """Figures of the held-out data (of `data`, if given).

    Always `loss`, the mean over all targets of all examples. Language models: `perplexity`. Choices: `accuracy`, and as
    loss that of the right ones. Classes: `accuracy`, macro
    `f1` and `auc` (not of tags); several classes at once: micro `f1`, `macro_f1`, `auc` and `exact`; tags: also
    `span_f1` where they are B-/I- tags. Numbers: `mae`, `rmse`, `pearson`.
    """
    data = prepared.validation if data is None else data
    assert data is not None
    if prepared.task == "multiple-choice":
        return _chosen(model, prepared, batch_size, device, data)
    training = model.training
    model.eval()
    total, count = 0.0, 0
    guesses: list[Tensor] = []
    truths: list[Tensor] = []
    try:
        with _unseen(device):
            for batch in by_length(data, prepared.collator, batch_size, device):
                loss, logits = _outcome(model, prepared.task, batch)
                labels = batch["labels"]
                targets = int((labels != IGNORED).sum()) if prepared.labels is None else _examples(labels, prepared)
                total += float(loss) * targets
                count += targets
                if logits is not None:
                    guesses += list(logits.float().cpu())
                    truths += list(labels.cpu())
    finally:
        model.train(training)
    figures = {"loss": total / max(count, 1)}
    if prepared.labels is None:
        return figures | {"perplexity": math.exp(min(figures["loss"], 700.0))}
    return figures | merit(prepared.task, prepared.labels, guesses, truths)


def _chosen(
    model: nn.Module, prepared: Prepared, batch_size: int, device: torch.device | str, data: Dataset
) -> dict[str, float]:
    """How often a model chooses right, and the loss of the right choices' tokens."""
    training = model.training
    model.eval()
    total, tokens, hits = 0.0, 0, 0
    try:
        with _unseen(device):
            for batch in by_length(data, prepared.collator, batch_size, device):
                found = choose(model, batch)
                count = int(found.right[found.sequence].sum())
                total, tokens = total + float(found.likelihood()) * count, tokens + count
                hits += int((found.chosen() == found.answers()).sum())
    finally:
        model.train(training)
    return {"loss": total / tokens, "accuracy": hits / len(data)}


def _unseen(device: torch.device | str) -> Any:
    """Random numbers drawn in this context do not count."""
    return torch.random.fork_rng([device] if torch.device(device).type == "cuda" else [])


def _outcome(model: nn.Module, task: str, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Loss of a batch, and the logits where figures need them."""
    loss = causal_loss(model, batch) if task == "causal-lm" else None
    if loss is not None:
        return loss, None
    output = model(**batch)
    return output.loss, None if task in (*GENERATIVE, "masked-lm") else output.logits


def _examples(labels: Tensor, prepared: Prepared) -> int:
    """How many terms the mean over a batch of labelled examples has."""
    return int((labels != IGNORED).sum()) if prepared.task == "token-classification" else labels.shape[0]


def merit(task: str, labels: Labels, guesses: Sequence[Tensor], truths: Sequence[Tensor]) -> dict[str, float]:
    """Figures of merit of logits, one tensor an example, against labels."""
    if labels.problem_type == "regression":
        return _numbers(torch.stack(list(guesses)), torch.stack(list(truths)))
    if labels.problem_type == "multi_label_classification":
        logits, truth = torch.stack(list(guesses)), torch.stack(list(truths)) > 0.5
        return _several(logits > 0, truth) | {"auc": _auc(logits, truth)}
    if task == "token-classification":
        pairs = [
            (logits[: len(tags)].argmax(-1)[tags != IGNORED], tags[tags != IGNORED])
            for logits, tags in zip(guesses, truths, strict=True)
        ]
        figures = _classes(torch.cat([one for one, _ in pairs]), torch.cat([two for _, two in pairs]))
        if any(name.startswith("B-") for name in labels.names):
            figures["span_f1"] = _span_f1(pairs, labels.names)
        return figures
    logits, truth = torch.stack(list(guesses)), torch.stack(list(truths))
    # One class against the others: its share, not its logit, says how sure a model of one class is.
    ranked = _auc(logits.softmax(-1), torch.nn.functional.one_hot(truth, logits.shape[-1]) > 0)
    return _classes(logits.argmax(-1), truth) | {"auc": ranked}


def _several(guess: Tensor, truth: Tensor) -> dict[str, float]:
    """Micro `f1`, `macro_f1` over the classes that occur, and `exact`, of `examples x classes` truth values."""
    hits, all_ = (guess & truth).sum(0), guess.sum(0) + truth.sum(0)
    occurs = truth.any(0)
    return {
        "f1": 2 * int(hits.sum()) / int(all_.sum()) if int(all_.sum()) else 1.0,
        "macro_f1": float((2 * hits[occurs] / all_[occurs]).mean()) if occurs.any() else 1.0,
        "exact": float((guess == truth).all(-1).float().mean()),
    }


def _auc(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve, the mean over classes: how often an example of a class scores above one that is none.

    Both are `examples x classes`. Classes that all or no examples have are left out; without any other it is 0.5.
    """
    areas = []
    for score, wanted in zip(scores.double().T, truth.T, strict=True):
        good, bad = score[wanted], score[~wanted].sort().values
        if len(good) and len(bad):
            below, upto = torch.searchsorted(bad, good), torch.searchsorted(bad, good, right=True)
            areas.append(float((below + upto).double().mean()) / (2 * len(bad)))
    return sum(areas) / len(areas) if areas else 0.5


def _classes(guess: Tensor, truth: Tensor) -> dict[str, float]:
    scores = []
    for one in truth.unique().tolist():
        hits = int(((guess == one) & (truth == one)).sum())
        scores.append(2 * hits / int((guess == one).sum() + (truth == one).sum()))
    return {"accuracy": float((guess == truth).float().mean()), "f1": sum(scores) / max(len(scores), 1)}


def _numbers(guess: Tensor, truth: Tensor) -> dict[str, float]:
    guess, truth = guess.double().reshape(len(guess), -1), truth.double().reshape(len(truth), -1)
    error = guess - truth
    centred = guess - guess.mean(0), truth - truth.mean(0)
    spread = centred[0].norm(dim=0) * centred[1].norm(dim=0)
    pearson = torch.where(spread > 0, (centred[0] * centred[1]).sum(0) / spread.clamp_min(1e-300), torch.zeros(()))
    return {
        "mae": float(error.abs().mean()),
        "rmse": float(error.square().mean().sqrt()),
        "pearson": float(pearson.mean()),
    }


def _span_f1(pairs: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> float:
    """F1 of whole spans, micro-averaged: a span counts when its kind and both its ends are right."""
    found = wanted = both = 0
    for guess, truth in pairs:
        ours, theirs = (set(_spans([names[int(tag)] for tag in tags])) for tags in (guess, truth))
        found, wanted, both = found + len(ours), wanted + len(theirs), both + len(ours & theirs)
    return 2 * both / (found + wanted) if found + wanted else 1.0


def _spans(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Start, end and kind of the spans that B-/I- tags mark; an I- tag that continues nothing begins one."""
    start, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        continues = tag.startswith("I-") and tag[2:] == kind
        if kind and not continues:
            yield start, index, kind
            kind = ""
        if tag[:2] in ("B-", "I-") and not continues:
            start, kind = index, tag[2:]


def samples(
    model: Any, prepared: Prepared, tokenizer: PreTrainedTokenizerBase, count: int, length: int, device: Any
) -> list[dict[str, str]]:
    """What the model writes for held-out prompts, greedily: `prompt`, `reference` and `generated` of each.

    A plain text has no prompt; its first half stands for one.
    """
    rows = prepared.validation if prepared.validation is not None else (None if prepared.packed else prepared.train)
    if prepared.task not in GENERATIVE or rows is None or not hasattr(model, "generate"):
        return []
    made = []
    training = model.training
    model.eval()
    try:
        with _unseen(device), torch.no_grad():
            shown = min(count, len(rows))
            # Spread over the data: neighbours tend to be alike.
            for index in (len(rows) * number // shown for number in range(shown)):
                prompt, answer = _question(rows[index], prepared.task)
                ids = torch.tensor([prompt], device=device)
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_room(model, prompt, length),
                    do_sample=False, num_beams=1, use_cache=True, pad_token_id=prepared.pad_token_id,
                )[0]  # fmt: skip
                new = out[len(prompt) :] if prepared.task == "causal-lm" else out
                texts = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, answer, new))
                made.append(dict(zip(("prompt", "reference", "generated"), map(str, texts), strict=True)))
    finally:
        model.train(training)
    return made


def _question(row: dict[str, Any], task: str) -> tuple[list[int], list[int]]:
    ids, labels = row["input_ids"], row["labels"]
    if task == "seq2seq":
        return ids, [label for label in labels if label != IGNORED]
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
    if first <= 1:
        first = max(1, len(ids) // 2)
    return ids[:first], [token for token, label in zip(ids[first:], labels[first:], strict=True) if label != IGNORED]


def _room(model: Any, prompt: Sequence[int], length: int) -> int:
    """How many tokens may follow a prompt."""
    config = model.config
    bound = getattr(config, "max_position_embeddings", None)
    if bound is None or config.is_encoder_decoder:
        return length
    return max(1, min(length, bound - len(prompt)))
