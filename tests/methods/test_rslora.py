"""rsLoRA is LoRA with its flag; what the flag does is tested with LoRA."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge


def test_it_is_lora_with_the_flag_and_the_flag_cannot_be_taken_away() -> None:
    model, x = net()
    nudge(attach(model, dw.RsLoRA, rank=3))
    twin, _ = net()
    nudge(attach(twin, dw.LoRA, rank=3, rslora=True))
    assert torch.equal(model(x), twin(x))
    other, _ = net()
    nudge(attach(other, dw.LoRA, rank=3))
    assert not torch.allclose(model(x), other(x))
    with pytest.raises(ValueError, match="rslora: rslora=False is not allowed"):
        dw.RsLoRA(rslora=False)
