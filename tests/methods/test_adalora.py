"""AdaLoRA: a falling budget of triplets, spent where it matters."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import deltaworks as dw
from deltaworks.core.ranks import triplets
from deltaworks.methods.adaptive.adalora import Budget
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part, steps

SETTINGS = {"init_rank": 4, "target_rank": 2, "t_init": 5, "t_final": 8, "interval": 2}
STEPS = 30


def start(**settings):
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.AdaLoRA, **(SETTINGS | settings))
    return model, x, tuned, tuned.rules[0]


def ranks(tuned: dw.Tuned) -> list[int]:
    return [int((l != 0).sum()) for _, _, l, _ in triplets(tuned)]


def test_the_output_does_not_change_at_the_start_and_the_divisor_is_the_first_rank() -> None:
    model, x, tuned, _ = start()
    with dw.disable(model):
        base = model(x)
    assert torch.equal(model(x), base)
    list(steps(model, x, tuned, STEPS))
    assert all(delta.scale == 16.0 / (4 + 1e-5) for delta in tuned.parts())


def test_the_budget_is_flat_then_cubic_then_flat() -> None:
    _, _, tuned, rule = start()
    run = tuned.run(STEPS).run
    for step in range(1, STEPS + 1):
        allowed, mask = rule.budget(step, run)
        if step <= 5:
            assert (allowed, mask) == (8, False)
        elif step <= 22:
            assert allowed == int(4 + 4 * (1 - (step - 5) / 17) ** 3) and mask == (step % 2 == 0)
        else:
            assert (allowed, mask) == (4, True)


def test_every_mask_leaves_exactly_the_budget() -> None:
    model, x, tuned, rule = start()
    run = tuned.run(STEPS).run
    for step in steps(model, x, tuned, STEPS):
        allowed, mask = rule.budget(step, run)
        if mask:
            assert sum(ranks(tuned)) == allowed, step
    assert sum(ranks(tuned)) == 4


def test_masked_triplets_train_on_until_the_last_phase_and_then_never() -> None:
    model, x, tuned, _ = start()
    masked: torch.Tensor | None = None
    returned = False
    for step in steps(model, x, tuned, STEPS):
        weights = torch.cat([l.detach().clone() for _, _, l, _ in triplets(tuned)])
        if 5 < step <= 22:
            returned |= step % 2 == 1 and masked is not None and bool((weights[masked] != 0).any())
        if step > 23:
            assert torch.equal(weights == 0, masked)
        masked = weights == 0
        if step == STEPS:
            assert masked.sum() == 4
    assert returned


def test_scores_do_not_move_in_the_last_phase() -> None:
    model, x, tuned, rule = start()
    fixed = None
    for step in steps(model, x, tuned, STEPS):
        if step == STEPS:
            break
        scores = torch.cat(list(rule.scores(tuned).values()))
        if step >= 22:
            assert fixed is None or torch.equal(scores, fixed)
            fixed = scores
        if step == 21:
            before = scores
    assert torch.equal(before, fixed)


def test_scores_are_smoothed_sensitivities_of_the_three_parts() -> None:
    model, x, tuned, rule = start()
    mean: dict = {}
    spread: dict = {}
    for step in steps(model, x, tuned, STEPS):
        for name, p, l, q in triplets(tuned):
            for key, w in (("p", p), ("l", l), ("q", q)):
                now = (w * w.grad).abs().detach()
                mean[name, key] = 0.85 * mean.get((name, key), 0) + 0.15 * now
                spread[name, key] = 0.85 * spread.get((name, key), 0) + 0.15 * (now - mean[name, key]).abs()
        if step == 3:
            for name, _, _, _ in triplets(tuned):
                s = {key: mean[name, key] * spread[name, key] for key in "plq"}
                assert torch.allclose(rule.scores(tuned)[name], s["l"] + s["p"].mean(0) + s["q"].mean(1))
            return


def test_ties_are_broken_by_position_so_that_the_budget_holds() -> None:
    _, _, tuned, rule = start()
    chosen = rule._lowest(tuned, 3)  # nothing has been observed: every score is zero
    assert torch.equal(torch.cat(list(chosen.values())), torch.arange(8) < 5)


def test_the_penalty_is_the_mean_distance_from_orthogonality() -> None:
    _, _, tuned, rule = start(gamma=0.3)
    eye = torch.eye(4, dtype=torch.float64)
    norms = [(gram - eye).norm() for _, p, _, q in triplets(tuned) for gram in (p.T @ p, q @ q.T)]
    assert torch.allclose(rule.penalty(tuned.run(STEPS).run), 0.3 * torch.stack(norms).mean())
    assert attach(net()[0], dw.AdaLoRA, gamma=0.0).rules[0].penalty(tuned.run(STEPS).run) is None


def test_ranks_go_where_the_change_is_needed() -> None:
    model, x = net(12, 8, 6)
    torch.manual_seed(3)
    x = torch.randn(200, 12, dtype=torch.float64)
    goal = copy.deepcopy(model)
    with torch.no_grad():
        goal.second.weight.add_(torch.randn(6, 8, dtype=torch.float64))
        target = goal(x)
    tuned = attach(model, dw.AdaLoRA, **(SETTINGS | {"target_rank": 1, "gamma": 0.0}))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.02)
    rules = tuned.run(120, optimizer=optimizer)
    rules.emit("attached")
    for _ in range(120):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        rules.emit("step_end")
    first, second = ranks(tuned)
    assert second > first and first + second == 2


def test_in_the_end_zero_triplets_are_gone_and_the_output_is_the_same() -> None:
    model, x, tuned, _ = start()
    kept = outputs = None
    for step in steps(model, x, tuned, STEPS):
        if step == STEPS:
            kept, outputs = ranks(tuned), model(x).detach()
    assert [delta.rank for delta in tuned.parts()] == kept and sum(kept) == 4
    assert torch.allclose(model(x), outputs)
    assert part(tuned).p.shape == (8, kept[0])


def test_the_compact_form_is_what_the_file_holds(tmp_path) -> None:
    model, x, tuned, _ = start()
    list(steps(model, x, tuned, STEPS))
    dw.save(model, tmp_path / "adapter")
    twin, _ = net(12, 8, 6)
    loaded = dw.load(twin, tmp_path / "adapter")
    assert [delta.rank for delta in loaded.parts()] == [delta.rank for delta in tuned.parts()]
    assert torch.equal(twin(x), model(x))


def test_a_layer_may_end_with_nothing() -> None:
    model, x, tuned, _ = start()
    with torch.no_grad():
        for _, _, l, _ in triplets(tuned):
            l.fill_(1.0)
        part(tuned).l.zero_()
    run = tuned.run(STEPS)
    run.run.step = STEPS
    run.emit("finished")
    assert [delta.rank for delta in tuned.parts()] == [0, 4]
    with dw.disable(model):
        base = model.first(x)
    assert torch.equal(model.first(x), base)


def test_a_resumed_run_ends_where_the_unbroken_one_does() -> None:
    def state(rules, optimizer, tuned):
        memory = io.BytesIO()
        parameters = [p.detach() for p in tuned.parameters()]
        torch.save((rules.state_dict(), optimizer.state_dict(), parameters), memory)
        return memory.getvalue()

    def train(stop: int, saved: bytes | None = None):
        model, x, tuned, _ = start()
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.05)
        rules = tuned.run(STEPS, optimizer=optimizer)
        rules.emit("attached")
        if saved is not None:
            rule_state, optimizer_state, parameters = torch.load(io.BytesIO(saved), weights_only=False)
            rules.load_state_dict(rule_state)
            optimizer.load_state_dict(optimizer_state)
            with torch.no_grad():
                for p, value in zip(tuned.parameters(), parameters, strict=True):
                    p.copy_(value)
        while rules.run.step < stop:
            optimizer.zero_grad()
            (model(x).square().mean() + rules.penalty()).backward()
            optimizer.step()
            rules.emit("step_end")
        return state(rules, optimizer, tuned), [p.detach().clone() for p in tuned.parameters()]

    _, unbroken = train(STEPS)
    for stop in (3, 11, 25):
        _, resumed = train(STEPS, train(stop)[0])
        assert all(torch.equal(a, b) for a, b in zip(resumed, unbroken, strict=True))


def test_phases_are_shares_of_the_run_or_steps() -> None:
    _, _, tuned, _ = start()
    run = tuned.run(200).run
    assert Budget(dw.AdaLoRA(t_init=0.1, t_final=0.5)).phases(run) == (20, 100)
    assert Budget(dw.AdaLoRA(t_init=12, t_final=50)).phases(run) == (12, 150)


def test_phases_that_do_not_fit_the_run_are_refused_before_it_begins() -> None:
    _, _, tuned, _ = start()
    with pytest.raises(ValueError, match="t_init and t_final take 5 and 8 steps; their sum must be below the run's 12"):
        tuned.run(12).emit("attached")


def test_a_target_above_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match="target_rank=9 is above init_rank=8; ranks only fall"):
        dw.AdaLoRA(init_rank=8, target_rank=9)


def test_ranks_over_time_are_recorded_for_the_report() -> None:
    model, x, tuned, _ = start()
    nudge(tuned)
    rules = tuned.run(STEPS)
    for _ in range(STEPS):
        model.zero_grad()
        model(x).square().mean().backward()
        rules.emit("step_end")
    assert [step for step, _ in rules.run.history["ranks"]] == list(range(1, STEPS + 1))
    assert sum(rules.run.history["ranks"][-1][1].values()) == rules.run.history["budget"][-1][1] == 4


def test_stacked_experts_share_one_budget_with_the_rest() -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.AdaLoRA(init_rank=4, target_rank=2, t_init=1, t_final=2), seed=0)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    rules = tuned.run(6, optimizer=optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        (model(**batch).loss + rules.penalty()).backward()
        optimizer.step()
        rules.emit("step_end")
    total = sum(l.numel() for _, _, l, _ in triplets(tuned))
    assert sum(ranks(tuned)) == total // 2
    expected = model(**batch).logits
    rules.emit("finished")
    assert sum(l.numel() for _, _, l, _ in triplets(tuned)) < total
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
