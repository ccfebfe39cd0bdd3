"""TriAdaptLoRA: triangles that grow where the core rose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.triangular import Triangular, widths
from deltaworks.core.operators.triplet import orthogonality
from tests.methods.resuming import trained
from tests.methods.toys import attach, net, nudge, steps

SETTINGS = {"reference": 5, "grow": 2, "warmup": 2, "interval": 3}
STEPS = 40


def start(**settings):
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.TriAdaptLoRA, **(SETTINGS | settings))
    return model, x, tuned, tuned.rules[0]


def ranks(tuned: dw.Tuned) -> list[int]:
    return [part.rank for part in tuned.parts()]


def test_the_core_is_two_block_triangles_that_share_the_diagonal_blocks() -> None:
    lower, upper = torch.arange(1.0, 1 + 1 + 6 + 10), 100 * torch.arange(1.0, 1 + 1 + 6 + 10)
    delta = Triangular(torch.zeros(5, 3), torch.zeros(4, 5), lower, upper, 1.0, 8, first=1, block=2)
    assert widths(5, 1, 2) == [1, 2, 2] and widths(4, 4, 4) == [4] and widths(6, 1, 3) == [1, 3, 2]
    expected, place = torch.zeros(5, 5), 0
    for first, last in ((0, 1), (1, 3), (3, 5)):
        width = last - first
        expected[first:last, :last] += lower[place : place + width * last].view(width, last)
        expected[:last, first:last] += upper[place : place + width * last].view(last, width)
        place += width * last
    assert torch.equal(delta.core(), expected)
    with pytest.raises(ValueError, match="the strips as blocks 1, 2 say"):
        Triangular(torch.zeros(5, 3), torch.zeros(4, 5), lower[1:], upper, 1.0, 8, first=1, block=2)


def test_the_count_is_the_formula_at_any_rank() -> None:
    for first in (4, 1):
        model, x, tuned, _ = start(init_rank=first, grow=4, reference=8)
        list(steps(model, x, tuned, STEPS))
        for part, size in zip(tuned.parts(), (20, 14), strict=True):
            r, own = part.rank, sum(p.numel() for p in part.parameters())
            if first == 4:
                assert own == r * size + r * r + r * 4
            assert own == r * size + 2 * sum(r_i * w for r_i, w in part._blocks())


def test_an_identity_in_the_middle_is_a_lora() -> None:
    model, x, tuned, _ = start(init_rank=3, alpha=5.0)
    nudge(tuned)
    part = next(tuned.parts())
    with torch.no_grad():
        part.lower.copy_(torch.eye(3).flatten())
        part.upper.zero_()
    expected = 5.0 / (5 + 1e-5) * part.b @ part.a
    assert torch.allclose(part.dense(), expected)
    assert torch.allclose(model.first(x), x @ (model.first.weight + expected).T + model.first.bias)


@pytest.mark.parametrize("divisor", ["reference", "rank"])
def test_growing_leaves_the_function_and_everything_new_gets_a_gradient(divisor: str) -> None:
    model, x, tuned, _ = start(divisor=divisor)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.05))
    rules = tuned.run(STEPS, optimizer=optimizer)
    rules.emit("attached")
    grown = None
    for _ in range(9):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        before, sizes = model(x).detach(), ranks(tuned)
        kept = {p: (p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for p in tuned.parameters()}
        rules.emit("step_end")
        if ranks(tuned) == sizes:
            continue
        assert torch.allclose(model(x), before, atol=1e-9)
        for _, part in tuned.of_kind(Triangular):
            for name, dim in (("a", 0), ("b", 1), ("lower", 0), ("upper", 0)):
                parameter = part.get_parameter(name)
                (value, moment), state = kept[parameter], optimizer.state[parameter]["exp_avg"]
                size = value.shape[dim]
                scaled = value if name != "b" or divisor == "reference" else parameter.narrow(dim, 0, size)
                assert torch.equal(parameter.narrow(dim, 0, size), scaled)
                assert torch.equal(state.narrow(dim, 0, size), moment) and state.shape == parameter.shape
                assert not state.narrow(dim, size, state.shape[dim] - size).any()
        grown = (grown or 0) + 1
    assert grown == 3
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert all((p.grad != 0).all() for p in tuned.parameters())


def test_ranks_never_fall_and_stop_at_the_reference_with_one_round_too_many_at_most() -> None:
    model, x, tuned, rule = start()
    before = ranks(tuned)
    for step in steps(model, x, tuned, STEPS):
        now, missing = ranks(tuned), 2 * 5 - sum(before)
        assert all(new >= old for new, old in zip(now, before, strict=True))
        if now != before:
            assert step > 2 and step % 3 == 0 and missing > 0
            grown = sum(new - old == 2 for new, old in zip(now, before, strict=True))
            assert grown == rule.number(missing, step, tuned.run(STEPS).run) and sum(now) - sum(before) == 2 * grown
        before = now
    assert 10 <= sum(before) < 10 + 2 * 2


def test_the_number_that_grow_is_what_is_missing_times_the_time_or_its_power() -> None:
    _, _, tuned, _ = start(grow=1)
    run = tuned.run(22).run
    for growth, expected in (("linear", [1, 2, 2]), ("exponential", [1, 1, 2])):
        rule = type(tuned.rules[0])(dw.TriAdaptLoRA(growth=growth, warmup=2, reference=5))
        assert [rule.number(9, step, run) for step in (3, 8, 22)] == expected  # two layers at most


def test_the_score_is_the_rise_of_the_core_and_needs_no_gradient() -> None:
    _, _, tuned, rule = start(warmup=0, interval=1)
    rules = tuned.run(STEPS)
    rules.emit("attached")
    first, second = tuned.parts()
    with torch.no_grad():
        first.lower.mul_(50)
        second.lower.mul_(0.5)
    rules.emit("step_end")
    assert ranks(tuned) == [3, 1] and all(p.grad is None for p in tuned.parameters())
    assert rule.previous[next(name for name, _ in tuned.named_parts())] > 0.1
    rules.emit("step_end")  # the norm is over more blocks now, so it has fallen
    assert ranks(tuned) == [3, 3]


def test_the_penalty_is_the_mean_distance_from_orthogonality() -> None:
    _, _, tuned, rule = start(gamma=0.5)
    nudge(tuned)
    expected = 0.5 * orthogonality((part.b, part.a) for part in tuned.parts())
    by_hand = [torch.linalg.matrix_norm(p.T @ p - torch.eye(1)) for part in tuned.parts() for p in (part.b, part.a.T)]
    assert torch.allclose(rule.penalty(tuned.run(9).run), expected)
    assert torch.allclose(expected, 0.5 * torch.stack(by_hand).mean())


@pytest.mark.parametrize(("family", "stops"), [("llama", (1, 6, 7, 12)), ("mixtral", (7,))])
def test_it_resumes_at_any_step_bit_for_bit(family: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    method = dw.TriAdaptLoRA(**SETTINGS)
    whole, history, tuned = trained(method, tmp_path, family)
    assert len({part.a.shape[-2] for _, part in tuned.of_kind(Triangular)}) > 1
    for stop in stops:
        resumed, again, _ = trained(method, tmp_path, family, stop=stop)
        assert list(whole) == list(resumed) and history == again, stop
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), stop


def test_ranks_cannot_be_asked_to_fall() -> None:
    with pytest.raises(ValueError, match="init_rank=3 is above reference=2; ranks only grow"):
        dw.TriAdaptLoRA(init_rank=3, reference=2)


def test_places_grow_by_blocks_of_their_own() -> None:
    own = {"init_rank": 3, "grow": 1, "divisor": "rank"}
    model, x, tuned, rule = start(reference=20, overrides={"second": own})
    nudge(tuned)
    rules = tuned.run(STEPS)
    rules.emit("attached")
    first, second = tuned.parts()
    assert list(rule.previous.values()) == pytest.approx([float(one.core().detach().norm()) for one in (first, second)])
    for _ in range(15):
        before = model(x).detach()
        rules.emit("step_end")
        assert torch.allclose(model(x), before, atol=1e-9)
    assert first.rank > 3 and first.rank % 2 == 1 and 4 < second.rank <= 3 + 5


@pytest.mark.parametrize("settings", [{"warmup": STEPS}, {"interval": STEPS + 1}])
def test_a_run_that_ends_before_the_first_check_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="triadaptlora: the first check is at step 4[12], the run has 40; shorten"):
        start(**settings)[2].run(STEPS).emit("attached")
    start(**settings, reference=1)[2].run(STEPS).emit("attached")
