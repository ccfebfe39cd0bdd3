"""SoRA: gates that reach zero exactly."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.methods.adaptive.sora import Threshold
from tests.methods.toys import attach, net, part, steps


def test_a_proximal_step_shrinks_by_the_threshold_and_stops_at_zero() -> None:
    model, _ = net(12, 8, 6)
    tuned = attach(model, dw.SoRA, rank=3, xi=0.15)
    gate = part(tuned).l
    with torch.no_grad():
        gate.copy_(torch.tensor([0.5, -0.2, 0.1]))
    rules = tuned.run(9)
    rules.emit("step_end")
    assert torch.allclose(gate, torch.tensor([0.35, -0.05, 0.0]).double()) and gate[2] == 0
    rules.emit("step_end")
    assert torch.allclose(gate, torch.tensor([0.2, 0.0, 0.0]).double())


def trained(count: int = 60, **settings):
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.SoRA, **({"rank": 4, "xi": 0.03} | settings))
    assert torch.equal(model(x), base)
    outputs = None
    for step in steps(model, x, tuned, count, lr=0.02):
        if step == count:
            outputs = model(x).detach(), [int((delta.l != 0).sum()) for delta in tuned.parts()]
    return model, x, tuned, outputs


def test_zeros_are_exact_layers_differ_and_the_compact_form_is_the_same_function() -> None:
    model, x, tuned, (expected, ranks) = trained()
    assert sum(ranks) < 8 and ranks[0] != ranks[1]
    assert [delta.rank for delta in tuned.parts()] == ranks
    assert torch.allclose(model(x), expected) and part(tuned).scale == 4.0


def test_a_penalty_alone_gives_no_zeros() -> None:
    _, _, _, (_, ranks) = trained(xi=0.0, l1=0.5)
    assert ranks == [4, 4]


def test_the_threshold_rises_and_may_follow_the_rate() -> None:
    model, _ = net(12, 8, 6)
    tuned = attach(model, dw.SoRA, xi=0.1, xi_end=0.3, by_rate=True)
    groups = tuned.parameter_groups(0.5, weight_decay=0.1)
    gate = part(tuned).l
    assert {g["weight_decay"] for g in groups if any(p is gate for p in g["params"])} == {0.0}
    run = tuned.run(10, optimizer=torch.optim.AdamW(groups)).run
    run.step = 5
    rule = tuned.rules[0]
    assert isinstance(rule, Threshold) and rule.xi(run, gate) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="needs the run's optimizer"):
        rule.xi(tuned.run(10).run, gate)
