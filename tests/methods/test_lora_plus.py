"""LoRA+ is LoRA with its ratio; what the ratio does is tested with LoRA."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net


def test_the_groups_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(net()[0], peft.LoraConfig(r=3, target_modules=["first", "second"]))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    names = {id(p): name for name, p in theirs.named_parameters()}
    wanted = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    model, _ = net()
    ours = attach(model, dw.LoRAPlus, rank=3).parameter_groups(1e-3)
    found = {name: group["lr"] for group in ours for name in group["names"]}
    assert len(found) == len(wanted)
    for name, rate in found.items():
        layer, factor = name.split(".")[0], name[-1].upper()
        assert rate == pytest.approx(wanted[f"base_model.model.{layer}.lora_{factor}.default.weight"])
