"""Full fine-tuning."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.families import FAMILIES


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert", "t5", "mixtral", "mamba", "vit", "cnn"])
def test_every_parameter_trains_and_a_tied_one_once(family: str) -> None:
    model, batch = FAMILIES[family]()
    names = [name for name, _ in model.named_parameters()]
    tuned = dw.attach(model, dw.Full())
    assert [name for name, _ in tuned.named_parameters()] == names
    assert tuned.summary().trainable == sum(p.numel() for p in model.parameters())
    model(**batch)
    assert set(tuned.tensors()) == set(names)


def test_on_limits_what_trains() -> None:
    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.Full(on=["mlp.down", "layers.0", "norm"]))
    names = [name for name, _ in tuned.named_parameters()]
    assert len(set(names)) == len(names)
    assert all("layers.0." in name or "down_proj" in name or "norm" in name for name in names)
    assert {name for name, _ in model.named_parameters() if "layers.0." in name} <= set(names)


def test_training_is_plain_training() -> None:
    runs = []
    for attach in (True, False):
        model, batch = FAMILIES["llama"]()
        parameters = dw.attach(model, dw.Full()).parameters() if attach else list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, 1e-3)
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model(**batch).logits)
    assert torch.equal(*runs)
