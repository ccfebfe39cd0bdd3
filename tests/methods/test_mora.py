"""MoRA: a square matrix between fixed operators."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.square import Square, SquareChain, merge
from tests.families import FAMILIES
from tests.methods.toys import assert_stored_and_merged, attach, net, nudge, part, saved_shapes


def square(r: int, kind: str, fan_out: int, fan_in: int) -> Square:
    m = torch.randn(r, r, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Square(m, kind, fan_out, fan_in)


@pytest.mark.parametrize(("fan_out", "fan_in", "r"), [(6, 9, 4), (9, 6, 4), (4, 5, 7), (8, 8, 4)])
def test_sharing_adds_entries_of_m_by_position(fan_out: int, fan_in: int, r: int) -> None:
    delta = square(r, "share", fan_out, fan_in)
    expected = torch.zeros(fan_out, fan_in, dtype=torch.float64)
    for padded in range(math.ceil(fan_in / r) * r):
        for i in range(fan_out):
            expected[i, padded % fan_in] += delta.m[i % r, padded % r].item()
    assert torch.allclose(delta.dense(), expected)


@pytest.mark.parametrize(("fan_out", "fan_in", "r"), [(6, 9, 4), (9, 6, 4), (4, 5, 8), (8, 8, 4), (24, 40, 14)])
def test_rotation_turns_each_block_by_its_position(fan_out: int, fan_in: int, r: int) -> None:
    delta = square(r, "rotate", fan_out, fan_in)
    blocks = math.ceil(fan_in / r)
    expected = torch.zeros(fan_out, fan_in, dtype=torch.float64)
    for block in range(blocks):
        turn = torch.zeros(r, r, dtype=torch.float64)
        for j in range(r // 2):
            angle = block * 10000 ** (-2 * j / r)
            turn[j, j] = turn[j + r // 2, j + r // 2] = math.cos(angle)
            turn[j, j + r // 2], turn[j + r // 2, j] = -math.sin(angle), math.sin(angle)
        change = delta.m.detach() @ turn
        for row in range(fan_out):
            place = row % (blocks * r)
            if place // r == block:
                for column in range(r):
                    expected[row, (block * r + column) % fan_in] += change[place % r, column]
    assert torch.allclose(delta.dense(), expected)


def test_ranks_are_far_above_loras() -> None:
    model, _ = net(32, 32, 32)
    for kind, rank in (("share", 11), ("rotate", 32)):
        delta = part(attach(model, dw.MoRA, rank=2, kind=kind))
        with torch.no_grad():
            delta.m.normal_()
        assert torch.linalg.matrix_rank(delta.dense()) == rank
        dw.detach(model)


@pytest.mark.parametrize("kind", ["share", "rotate"])
def test_it_starts_unchanged_with_a_gradient_and_merges_at_any_width(kind: str) -> None:
    model, x = net(13, 9, 5)
    base = model(x)
    tuned = attach(model, dw.MoRA, rank=2, kind=kind)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    for p in tuned.parameters():
        assert p.grad.abs().max() > 0
        with torch.no_grad():
            p.normal_(std=0.3)
    beside = model(x)
    assert not torch.allclose(beside, base)
    dw.merge(model)
    assert torch.allclose(model(x), beside)


@pytest.mark.parametrize("kind", ["share", "rotate"])
def test_gradients_are_the_derivatives(kind: str) -> None:
    delta = square(4, kind, 5, 6)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, m: delta.side(x), (x, delta.m))


def test_the_sides_are_the_papers() -> None:
    for kind, side in (("share", 111), ("rotate", 110)):
        model, _ = net(768, 768, 2)
        assert part(attach(model, dw.MoRA, rank=8, kind=kind)).m.shape == (side, side)


def test_sharing_keeps_the_sums_and_rotation_the_input() -> None:
    model, x = net(32, 32, 32)
    x.requires_grad_()
    attach(model, dw.MoRA, rank=1, kind="share")
    assert [shape for shape in saved_shapes(lambda: model.first(x)) if len(shape) > 1 and 32 in shape] == []
    dw.detach(model)
    attach(model, dw.MoRA, rank=1, kind="rotate")
    assert saved_shapes(lambda: model.first(x)) == [(2, 5, 32)]


# ReMoRA

WAYS = [(False, False), (True, True), (True, False), (False, True)]  # neighbours of the input, of the output


def chain(r: int, fan_out: int, fan_in: int, dropout: float = 0.0) -> SquareChain:
    """The first of a chain's links, with a random M."""
    m = torch.randn(r, r, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return SquareChain(m, m.new_zeros(2 * r, 2 * r), m.new_tensor([[1, 0], [0, 0]]), fan_out, fan_in, dropout)


def remora(steps: int, every: int, stop: int | None = None, look=None, **settings):
    """A plain loop under a falling rate; broken off and resumed after step `stop`."""

    def begin():
        model, x = net(13, 9, 5)
        tuned = attach(model, dw.MoRA, rank=1, kind="share", merge_every=every, **{"warmup": 2, **settings})
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.05))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return model, x, tuned, optimizer, schedule, tuned.run(steps, optimizer=optimizer)

    model, x, tuned, optimizer, schedule, rules = begin()
    rules.emit("attached")
    for step in range(1, steps + 1):
        model(x).sub(1.0).square().mean().backward()
        rules.emit("gradients")
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        before = model(x).detach()
        rules.emit("step_end")
        schedule.step()
        optimizer.zero_grad()
        if look:
            look(step, before, model(x).detach(), rate, tuned, optimizer)
        if step == stop:
            held = (tuned.tensors(), optimizer.state_dict(), schedule.state_dict(), rules.state_dict())
            kept = copy.deepcopy(held)
            model, x, tuned, optimizer, schedule, rules = begin()
            with torch.no_grad():
                for name, value in tuned.tensors().items():
                    value.copy_(kept[0][name])
            for one, state in zip((optimizer, schedule, rules), kept[1:], strict=True):
                one.load_state_dict(state)
    return model, x, tuned


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize(("fan_out", "fan_in", "r"), [(6, 9, 4), (9, 6, 4), (4, 5, 7), (8, 8, 4)])
def test_every_merge_shares_in_the_next_of_four_ways(fan_out: int, fan_in: int, r: int, way: int) -> None:
    delta, m = chain(r, fan_out, fan_in), square(r, "share", fan_out, fan_in).m.detach()
    delta.m.data.zero_()
    for _ in range(way):
        merge(delta.m, delta.past, delta.at)
    assert not delta.past.any()
    delta.m.data.copy_(m)
    expected = torch.zeros(fan_out, fan_in, dtype=torch.float64)
    rows, columns = (torch.arange(n).tensor_split(r) for n in (fan_out, fan_in))
    for k in range(r):
        for j in range(r):
            inputs = [i % fan_in for i in range(math.ceil(fan_in / r) * r) if i % r == j]
            inputs = columns[j].tolist() if WAYS[way][0] else inputs
            for i in rows[k].tolist() if WAYS[way][1] else range(k, fan_out, r):
                for column in inputs:
                    expected[i, column] += m[k, j]
    assert torch.allclose(delta.dense(), expected)
    merge(delta.m, delta.past, delta.at)
    assert torch.allclose(delta.dense(), expected) and not delta.m.any()
    x = torch.randn(3, fan_in, dtype=torch.float64, requires_grad=True)
    delta.m.data.copy_(m)
    assert torch.allclose(delta.side(x), x @ delta.dense().T)
    assert torch.autograd.gradcheck(lambda x, m: delta.side(x), (x, delta.m))


def test_links_that_share_in_other_ways_raise_the_rank() -> None:
    delta = chain(3, 12, 12)
    ranks = []
    for link in range(8):
        delta.m.data.normal_(generator=torch.Generator().manual_seed(link))
        ranks.append(int(torch.linalg.matrix_rank(delta.dense())))
        merge(delta.m, delta.past, delta.at)
    assert ranks == [3] + [5] * 7  # both ways of adding up have the sum of all inputs in common


def test_a_merge_leaves_the_output_and_begins_optimizer_and_rate_anew() -> None:
    rates, counts = [], []

    def look(step, before, after, rate, tuned, optimizer) -> None:
        assert torch.allclose(after, before, atol=1e-12)
        rates.append(rate / (0.05 * (1 - (step - 1) / 11)))
        held = [optimizer.state.get(delta.m, {}) for delta in tuned.parts()]
        counts.append({int(one.get("step", 0)) for one in held})
        assert all((not delta.m.any()) == (step in (4, 8)) for delta in tuned.parts())
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 - step / 11))

    _, _, tuned = remora(11, 4, look=look)
    assert counts == [{n} for n in (1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3)]
    assert rates == pytest.approx([1] * 4 + [1 / 3, 2 / 3, 1, 1] + [1 / 3, 2 / 3, 1])
    for delta in tuned.parts():  # two of the four quarters are filled, M acts in the third
        r = len(delta.m)
        assert delta.past[:r, :r].any() and delta.past[r:, r:].any()
        assert not delta.past[:r, r:].any() and not delta.past[r:, :r].any()
        assert delta.at.tolist() == [[0, 1], [0, 0]]


def test_a_chain_starts_as_the_base_with_a_gradient_and_ends_stored_and_merged(tmp_path) -> None:
    model, x = net(13, 9, 5)
    base = model(x)
    tuned = attach(model, dw.MoRA, rank=1, kind="share", merge_every=100)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in tuned.parameters())
    assert [tuple(p.shape) for p in tuned.parameters()] == [(5, 5), (4, 4)]
    model, x, _ = remora(9, 2, warmup=0)
    assert_stored_and_merged(model, net(13, 9, 5)[0], x, tmp_path)


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_chain_goes_on_after_any_step(stop: int) -> None:
    whole, x, _ = remora(8, 3)
    resumed, _, _ = remora(8, 3, stop=stop)
    assert torch.equal(resumed(x), whole(x))


def test_without_merges_there_is_no_chain() -> None:
    model, _ = net(13, 9, 5)
    tuned = attach(model, dw.MoRA, rank=1, kind="share")
    assert [type(delta) for delta in tuned.parts()] == [Square, Square] and tuned.rules == []
    plain, x, tuned = remora(3, 3)
    assert all(delta.m.any() and not delta.past.any() for delta in tuned.parts())
    chained, _, _ = remora(3, 1000, warmup=50)
    assert torch.equal(plain(x), chained(x))  # a run no longer than a link


def test_the_first_link_trains_as_mora_does() -> None:
    chained, x, _ = remora(5, 100)
    model, _ = net(13, 9, 5)
    tuned = attach(model, dw.MoRA, rank=1, kind="share")
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.05))
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 5)
        optimizer.zero_grad()
        model(x).sub(1.0).square().mean().backward()
        optimizer.step()
    assert torch.allclose(model(x), chained(x))


def test_stacked_experts_are_merged_too() -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.MoRA(rank=2, kind="share", merge_every=1, warmup=0, on="experts"), seed=0)
    rules = tuned.run(3)
    rules.emit("attached")
    for _ in range(2):
        nudge(tuned)
        before = copy.deepcopy(model)(**batch).logits
        rules.emit("step_end")
        assert torch.allclose(model(**batch).logits, before, atol=1e-5)
        assert not any(delta.m.any() for delta in tuned.parts())


def test_no_dropout_comes_before_what_is_merged() -> None:
    delta, x = chain(4, 6, 9, dropout=0.5).train(), torch.randn(3, 9, dtype=torch.float64)
    assert not torch.equal(delta.side(x), delta.side(x))
    merge(delta.m, delta.past, delta.at)
    assert delta.past.any() and torch.allclose(delta.side(x), x @ delta.dense().T)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"merge_every": 2000}, "merge_every=2000 is for kind='share', not rotate"),
        ({"merge_every": 0, "kind": "share"}, "merge_every=0 .* at least 1"),
        ({"merge_every": 50, "kind": "share"}, "warmup=50 must be below merge_every=50"),
        ({"warmup": 10, "kind": "share"}, "warmup=10 is for merge_every"),
    ],
)
def test_wrong_merges_are_refused(settings: dict, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"^mora: {wrong}"):
        dw.MoRA(**settings)


def test_finished_links_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"M \[4, 4\] needs past of twice its sides and a 2 x 2 place, not \[4, 4\]"):
        SquareChain(torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(2, 2), 6, 9)
