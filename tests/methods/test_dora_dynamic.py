"""Dynamic DoRA: components leave by their share of the change."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.ranks import triplets
from deltaworks.methods.adaptive.dora_dynamic import shares
from tests.methods.toys import attach, net, nudge, part, steps

SETTINGS = {"init_rank": 4, "target_rank": 2, "interval": 3, "dropout": 0.0}
STEPS = 40  # the window is steps 6 to 20


def start(**settings):
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.DynamicDoRA, **(SETTINGS | settings))
    return model, x, tuned, tuned.rules[0]


def test_cheap_norms_are_the_dense_ones() -> None:
    _, _, tuned, _ = start()
    nudge(tuned)
    for name, p, l, q in triplets(tuned):
        whole = (p * l) @ q
        dense = [(l[i] * torch.outer(p[:, i], q[i])).norm() / whole.norm() for i in range(4)]
        assert torch.allclose(shares(tuned)[name], torch.stack(dense))


def test_pruning_is_slow_first_fast_late_and_keeps_what_is_due() -> None:
    model, x, tuned, rule = start()
    base = model.second(torch.tanh(model.first(x)))
    with dw.disable(model):
        assert torch.equal(model(x), base)
    run = tuned.run(STEPS).run
    due = {step: rule.pruned(step, run) for step in range(1, STEPS + 1)}
    assert {s: d for s, d in due.items() if d is not None} == {
        s: int(4 * ((s - 6) / 14) ** 3) for s in (6, 9, 12, 15, 18, 20)
    }
    assert due[20] == 4 and due[12] == 0
    fixed = None
    for step in steps(model, x, tuned, STEPS):
        zero = torch.cat([l == 0 for _, _, l, _ in triplets(tuned)]).clone()
        if due[step] is not None:
            assert zero.sum() == due[step]
        if step >= 20:
            assert zero.sum() == 4 and (fixed is None or torch.equal(zero, fixed))
            fixed = zero
        last = model(x).detach()
    assert sum(delta.rank for delta in tuned.parts()) == 4 and torch.allclose(model(x), last)


def test_scores_are_smoothed_shares_and_no_gradient_enters() -> None:
    _, _, tuned, rule = start()
    nudge(tuned)
    rules = tuned.run(STEPS)
    rules.emit("step_end")
    expected = {name: 0.1 * share for name, share in shares(tuned).items()}
    assert all(torch.allclose(rule.scores[name], expected[name]) for name in expected)
    assert all(p.grad is None for p in tuned.parameters())


def test_the_penalty_is_the_mean_variance_until_the_window_ends() -> None:
    _, _, tuned, rule = start(beta=0.5)
    run = tuned.run(STEPS).run
    spreads = torch.cat([v for _, p, _, q in triplets(tuned) for v in (p.var(0), q.var(1))])
    assert torch.allclose(rule.penalty(run), 0.5 * spreads.mean())
    run.step = 20
    assert rule.penalty(run) is None


def test_settings_that_leave_nothing_to_do_are_refused() -> None:
    with pytest.raises(ValueError, match="leave no time to prune"):
        dw.DynamicDoRA(first=0.5, last=0.5)
    with pytest.raises(ValueError, match="target_rank=5 is above init_rank=4"):
        start(target_rank=5)
    assert part(start()[2]).scale == 2.0
