"""QLoRA is LoRA in the paper's settings, and says so when the base is not quantised."""

from __future__ import annotations

import warnings

import pytest
import torch

import deltaworks as dw
from deltaworks.model.loading import load_base
from tests.families import FAMILIES


def test_it_warns_beside_full_weights_and_is_lora() -> None:
    model, batch = FAMILIES["llama"]()
    with pytest.warns(UserWarning, match="--quantize nf4"):
        ours = dw.attach(model, dw.QLoRA(), seed=0).tensors()
    twin, _ = FAMILIES["llama"]()
    lora = dw.attach(twin, dw.LoRA(rank=64, dropout=0.1), seed=0)
    assert all(torch.equal(value, lora.tensors()[name]) for name, value in ours.items())
    assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_it_is_silent_beside_four_bits(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    FAMILIES["llama"]()[0].save_pretrained(tmp_path)
    model = load_base(tmp_path, quantize="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = dw.attach(model, dw.QLoRA(), seed=0)
    assert next(tuned.parts()).rank == 64
