"""Every method learns: on the shipped pre-trained decoder, from real signatures and docstrings, the loss falls."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks import nursery
from tests.conformance.subject import METHODS

STEPS, ROWS, LENGTH = 8, 4, 48


@functools.cache
def _pieces() -> tuple[nn.Module, Any]:
    return nursery.base("decoder")


@functools.cache
def batch() -> dict[str, torch.Tensor]:
    """A few signatures with their docstrings; the loss is on the docstrings."""
    _, tokenizer = _pieces()
    rows = nursery.data("docstrings")["train"].select(range(ROWS))
    ids, labels = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"][-LENGTH // 2 :]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        whole = (prompt + answer + [tokenizer.eos_token_id])[:LENGTH]
        gap = LENGTH - len(whole)
        ids.append(whole + [tokenizer.pad_token_id] * gap)
        labels.append([-100] * len(prompt) + whole[len(prompt) :] + [-100] * gap)
    mask = [[int(label != -100 or i < len(row)) for i, label in enumerate(row)] for row in labels]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask) * (torch.tensor(ids) != tokenizer.pad_token_id),
        "labels": torch.tensor(labels),
    }


def base() -> nn.Module:
    """A fresh copy of the decoder."""
    import copy

    return copy.deepcopy(_pieces()[0])


@pytest.mark.parametrize("slug", METHODS)
def test_the_loss_falls(slug: str) -> None:
    model, inputs = base(), batch()
    method = dw.method(slug)
    tuned = dw.attach(model, method, data=[inputs] if method.needs_data else None, seed=0)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(method.default_lr))
    rules = tuned.run(STEPS, seed=0, optimizer=optimizer)
    rules.emit("attached")
    with torch.no_grad():
        before = model(**inputs).loss.item()
    for _ in range(STEPS):
        rules.emit("step_begin")
        if rules.owner is not None:
            rules.owner.own_step(rules.run, lambda: model(**inputs).loss, method.default_lr)
        else:
            loss = model(**inputs).loss
            penalty = rules.penalty()
            (loss if penalty is None else loss + penalty).backward()
            rules.emit("gradients")
            optimizer.step()
        rules.emit("step_end")
        optimizer.zero_grad()
    rules.emit("finished")
    with torch.no_grad():
        after = model(**inputs).loss.item()
    # A step without gradients is worth a hundredth of one with.
    least = 1e-3 if rules.owner is None else 1e-5
    assert after < before - least, f"{before:.5f} -> {after:.5f}"
