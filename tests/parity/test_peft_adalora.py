"""AdaLoRA computes, schedules and prunes as `peft` does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.ranks import triplets
from tests.methods.toys import net
from tests.parity.twins import assert_equal, layer, twins

peft = pytest.importorskip("peft")
SETTINGS = {"init_r": 4, "target_r": 2, "lora_alpha": 16, "target_modules": ["first", "second"]}
SCHEDULE = {"tinit": 4, "tfinal": 10, "deltaT": 2, "total_step": 30}


def translate(layer) -> dict[str, torch.Tensor]:
    p, e, q = (getattr(layer, f"lora_{key}")["default"] for key in "BEA")
    return {"p": p, "l": e.view(-1), "q": q}


def start() -> tuple:
    method = dw.AdaLoRA(
        on=nn.Linear, init_rank=4, target_rank=2, alpha=16.0, t_init=4, t_final=10, interval=2, gamma=0.5
    )
    return twins(method, peft.AdaLoraConfig(**SETTINGS, **SCHEDULE), translate)


def test_outputs_and_gradients() -> None:
    ours, tuned, theirs = start()
    assert_equal(ours, tuned, theirs, translate)


def test_the_whole_falling_budget() -> None:
    ours, tuned, theirs = start()
    x = net()[1]
    target = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3)).double()
    allocator = theirs.base_model.rankallocator
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.01)
        for model in (ours, theirs)
    ]
    rules = tuned.run(30, optimizer=optimizers[0])
    rules.emit("attached")
    pruned = 0
    for step in range(1, 30):
        for optimizer in optimizers:
            optimizer.zero_grad()
        penalty = rules.penalty()
        ((ours(x) - target).square().mean() + penalty).backward()
        loss = (theirs(x) - target).square().mean()
        orthogonal = []
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                orthogonal.append(torch.norm(gram - torch.eye(len(gram), dtype=gram.dtype), p="fro"))
        (loss + 0.5 * sum(orthogonal) / len(orthogonal)).backward()
        for optimizer in optimizers:
            optimizer.step()
        rules.emit("step_end")
        allocator.update_and_allocate(theirs.base_model, step)
        assert rules.rules[0].budget(step, rules.run)[0] == allocator.budget_schedule(step)[0]
        for name, p, l, q in triplets(tuned):
            expected = translate(layer(theirs, name))
            assert torch.equal(l == 0, expected["l"] == 0), step
            pruned += int((l == 0).sum())
            for value, key in ((p, "p"), (l, "l"), (q, "q")):
                assert torch.allclose(value, expected[key]), (step, key)
    assert pruned > 20
