"""SwitchLoRA: switches keep the function, partners stand still, and the change outgrows the rank."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.methods.lowrank.switchlora import vectors
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part

FAST = {"rank": 3, "interval": 4.0, "still": 2, "decay": 100.0}


def started(count: int = 40, sizes: tuple[int, ...] = (12, 8, 6), **settings):
    model, x = net(*sizes)
    tuned = attach(model, dw.SwitchLoRA, **(FAST | settings))
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.02))
    rules = tuned.run(count, optimizer=optimizer)
    rules.emit("attached")
    return model, x, tuned, optimizer, rules


def step(model, x, optimizer, rules) -> None:
    rules.emit("step_begin")
    (model(x) - 1).square().mean().backward()
    rules.emit("gradients")
    optimizer.step()
    rules.emit("step_end")
    optimizer.zero_grad()


def test_the_start_is_the_base() -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.SwitchLoRA, **FAST)
    assert torch.allclose(model(x), base, atol=1e-12)
    assert all(delta.b.abs().max() > 0 for delta in tuned.parts())


def test_a_switch_leaves_the_function_and_puts_the_vector_back_into_the_pool() -> None:
    model, x, tuned, optimizer, rules = started(alpha=3.0)
    rule, expected = rules.rules[0], model(x).detach()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # what is left of a step are its switches
    before = part(tuned).a.clone()
    for _ in range(12):
        step(model, x, optimizer, rules)
    assert torch.allclose(model(x), expected, atol=1e-6)
    delta, side = part(tuned), rule.sides["first.weight.a"]
    assert not torch.equal(delta.a, before)
    kept = {tuple(row.float().tolist()) for row in side["pool"].values()}
    active = {tuple(row.float().tolist()) for row in delta.a}
    assert {tuple(row.float().tolist()) for row in before} <= kept | active
    assert len(set(side["slots"])) == 3 and sum(s for _, s in rules.run.history["switchlora.switched"]) > 8


@pytest.mark.parametrize(("size", "rank"), [(8, 3), (6, 5), (4, 4)])
@pytest.mark.parametrize("key", ["a", "b"])
def test_vectors_in_use_and_those_in_the_pool_stay_the_same(size: int, rank: int, key: str) -> None:
    model, x, tuned, optimizer, rules = started(sizes=(size + 3, size, 2), rank=rank, interval=2.0, still=1)
    expected, side = model(x).detach(), rules.rules[0].sides[f"first.weight.{key}"]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    known = set()
    for _ in range(24):
        active = {tuple(row) for row in vectors(part(tuned))[key].tolist()}
        pool = {tuple(row.tolist()) for row in side["pool"].values()}
        assert len(active) == len(set(side["slots"])) == rank and not active & pool
        assert not set(side["slots"]) & set(side["pool"]) and known <= active | pool
        known = active | pool
        step(model, x, optimizer, rules)
    assert len(known) == size and torch.allclose(model(x), expected, atol=1e-6)


def test_the_partner_of_a_switched_vector_stands_still_for_exactly_n_steps_with_its_state_gone() -> None:
    model, x, tuned, optimizer, rules = started(interval=1000.0, still=3)
    rule = rules.rules[0]
    for _ in range(4):
        step(model, x, optimizer, rules)
    assert rule.sides["first.weight.b"]["step"].tolist() == [4, 4, 4]
    b = part(tuned).b.clone()
    rule.rate = lambda rank, run: 1.0 if run.step == 4 else 0.0
    moved = []
    for _ in range(5):
        step(model, x, optimizer, rules)
        moved.append((part(tuned).b != b).all(0).tolist())
        b = part(tuned).b.clone()
        if len(moved) == 1:
            side = rule.sides["first.weight.b"]
            assert side["step"][0] == 0 and side["m"][0].abs().max() == 0 == side["v"][0].abs().max()
            assert side["step"][2] == 5
    assert [row[0] for row in moved] == [False, False, False, True, True]
    assert all(row[2] for row in moved)


def test_the_rate_of_switches_falls_to_three_tenths() -> None:
    _, _, _, _, rules = started(count=100, decay=0.1)
    rule, whole = rules.rules[0], rules.run
    whole.step = 9
    assert rule.rate(8, whole) == pytest.approx(0.3 * 8 / 4)
    with pytest.raises(ValueError, match="twice still"):
        dw.SwitchLoRA(interval=9.0, still=5)


def test_expected_switches_happen() -> None:
    model, x, _, optimizer, rules = started(count=200, interval=10.0, still=1)
    for _ in range(200):
        step(model, x, optimizer, rules)
    total = sum(number for _, number in rules.run.history["switchlora.switched"])
    assert total == pytest.approx(4 * 200 * 3 / 10, rel=0.2)


def test_without_switches_the_step_is_adamws() -> None:
    model, x, tuned, optimizer, rules = started(interval=1e9)
    twin, _ = net(12, 8, 6)
    other = attach(twin, dw.SwitchLoRA, **FAST)
    plain = torch.optim.AdamW(other.parameter_groups(0.02))
    for _ in range(5):
        step(model, x, optimizer, rules)
        plain.zero_grad()
        (twin(x) - 1).square().mean().backward()
        plain.step()
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(tuned.parameters(), other.parameters(), strict=True))
    assert not optimizer.state


def test_the_change_outgrows_the_rank() -> None:
    ranks = []
    for interval in (1e9, 4.0):
        model, x, tuned, optimizer, rules = started(interval=interval)
        for _ in range(40):
            step(model, x, optimizer, rules)
        delta = part(tuned)
        ranks.append(int(torch.linalg.matrix_rank(delta.dense(), rtol=1e-6)))
    # Start and end of fixed factors are two products of rank 3.
    assert ranks[0] <= 6 < ranks[1]


def test_stacked_experts_switch_too() -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.SwitchLoRA(on="experts", rank=4, interval=4.0, still=1), seed=0)
    nudge(tuned)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.0))
    rules = tuned.run(10, optimizer=optimizer)
    rules.emit("attached")
    expected = model(**batch).logits.detach()
    for _ in range(4):
        model(**batch).loss.backward()
        rules.emit("gradients")
        rules.emit("step_end")
    assert rules.run.history["switchlora.switched"][0][1] > 0
    assert torch.allclose(model(**batch).logits, expected, atol=1e-4)
