"""What the operators owe the models they sit in, whatever the method."""

from __future__ import annotations

import pytest
from torch import nn

import deltaworks as dw
from tests.methods.toys import attach, net

METHODS = {
    "low rank": (dw.LoRA, {"rank": 1}),
    "low rank as a weight": (dw.LoRA, {"rank": 32}),
    "decomposed": (dw.DoRA, {}),
    "scaled": (dw.VeRA, {"rank": 4}),
    "waves": (dw.FourierFT, {"n": 1}),
    "spectrum": (dw.FourierFT, {"n": 50}),
    "circulant": (dw.C3A, {}),
    "triplets": (dw.AdaLoRA, {}),
    "blocks": (dw.MELoRA, {}),
    "square": (dw.MoRA, {}),
    "affine": (dw.BoneBAT, {}),
    "tiled": (dw.MiSS, {}),
    "random bases": (dw.RandLoRA, {"rank": 3}),
    "lent": (dw.ShareLoRA, {}),
    "three factors": (dw.NLoRA, {"rank": 4}),
    "middle": (dw.IntTune, {"rank": 4}),
    "trapezoid": (dw.QRLoRA, {"rank": 4}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", METHODS)
def test_a_layers_output_can_be_added_to_in_place(form: str, bias: bool) -> None:
    method, settings = METHODS[form]
    model, x = net(64, 64, 64)
    if not bias:
        model.first = nn.Linear(64, 64, bias=False).double()
    tuned = attach(model, method, **settings)
    y = model.first(x)
    y += x
    model.second(y).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tuned.parameters())
