"""`Rules.step` is one step of a person's own loop, whatever a method does in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltaworks as dw
from deltaworks.core.rule import Rule, Run
from tests.families import FAMILIES


class Noted(Rule):
    """Notes what it hears, and adds a term to the loss."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.largest = 0.0

    def step_begin(self, run: Run) -> None:
        self.heard.append(("begin", run.step))

    def gradients(self, run: Run) -> None:
        self.heard.append(("gradients", run.step))
        self.largest = norm(run)

    def step_end(self, run: Run) -> None:
        self.heard.append(("end", run.step))
        self.clipped = norm(run)

    def penalty(self, run: Run) -> Tensor:
        return sum((parameter.square().sum() for parameter in run.tuned.parameters()), torch.zeros(()))


def norm(run: Run) -> float:
    found = [parameter.grad for parameter in run.tuned.parameters() if parameter.grad is not None]
    return float(torch.stack([gradient.norm() for gradient in found]).norm())


def made(method: dw.Method, *rules: Rule, lr: float = 1e-2) -> tuple[Any, dict[str, Any], dw.Tuned, Any]:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model.train(), method, seed=0)
    tuned.rules.extend(rules)
    return model, batch, tuned, tuned.run(4, seed=3, optimizer=torch.optim.SGD(tuned.parameter_groups(lr)))


def test_the_penalty_counts_and_rules_see_gradients_before_they_are_clipped() -> None:
    rule = Noted()
    model, batch, tuned, rules = made(dw.LoRA(rank=2), rule)
    twin_model, _, twin, _ = made(dw.LoRA(rank=2))
    loss = twin_model(**batch).loss
    (loss + rule.penalty(Run(twin))).backward()
    clip = norm(Run(twin)) / 2
    torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
    torch.optim.SGD(twin.parameters(), 1e-2).step()

    assert rules.step(lambda: model(**batch).loss, clip=clip) == loss.detach()
    assert rule.heard == [("begin", 0), ("gradients", 0), ("end", 1)]
    assert rule.largest == pytest.approx(2 * clip) and rule.clipped == pytest.approx(clip)
    assert all(torch.equal(one, other) for one, other in zip(tuned.parameters(), twin.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in tuned.parameters())


def test_a_rule_that_owns_the_step_makes_it_at_the_optimizers_rate() -> None:
    model, batch, tuned, rules = made(dw.MeZO(over="lora", settings_of_over={"rank": 2}), lr=1e-3)
    _, _, twin, others = made(dw.MeZO(over="lora", settings_of_over={"rank": 2}))
    for one in (rules, others):
        one.emit("attached")
    expected = others.owner.own_step(others.run, lambda: twin.model(**batch).loss, 1e-3)
    assert rules.step(lambda: model(**batch).loss) == expected
    assert rules.run.step == 1
    assert all(torch.equal(one, other) for one, other in zip(tuned.parameters(), twin.parameters(), strict=True))


def test_a_step_without_an_optimizer_says_what_is_missing() -> None:
    model, batch = FAMILIES["llama"]()
    rules = dw.attach(model, dw.LoRA(rank=2)).run(1)
    with pytest.raises(ValueError, match=r"a step needs an optimizer; give it to run\(\.\.\., optimizer="):
        rules.step(lambda: model(**batch).loss)
