"""RandLoRA: full rank from frozen random bases."""

from __future__ import annotations

import math

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.random_bases import RandomBases
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps


def start(*sizes: int, **settings):
    model, x = net(*(sizes or (12, 8, 10)))
    tuned = attach(model, dw.RandLoRA, **({"rank": 3} | settings))
    return model, x, tuned


def test_it_starts_unchanged_and_only_lambda_has_a_gradient() -> None:
    model, x, tuned = start()
    with dw.disable(model):
        base = model(x)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    for name, p in tuned.named_parameters():
        assert (p.grad.abs().max() > 0) == name.endswith("lam")


def test_the_change_has_full_rank_on_either_orientation() -> None:
    _, _, tuned = start()
    nudge(tuned)
    assert [torch.linalg.matrix_rank(delta.dense()).item() for delta in tuned.parts()] == [8, 8]


def test_the_change_is_the_sum_over_scaled_bases() -> None:
    _, _, tuned = start()
    nudge(tuned)
    for delta in tuned.parts():
        short, long = min(delta.fan_out, delta.fan_in), max(delta.fan_out, delta.fan_in)
        count = math.ceil(short / 3)
        columns = delta.bases.b[:long, :count].flatten(1)
        total = torch.zeros(long, short, dtype=torch.float64)
        for n in range(count):
            mine = columns[:, n::count]  # the columns that meet basis n
            total += mine @ torch.diag(delta.lam[:, n]) @ delta.bases.a[:, :short] @ torch.diag(delta.gamma[n])
        assert torch.allclose(delta.dense(), 20 * (total if delta.fan_in == short else total.T))


@pytest.mark.parametrize("rows", [1, 50])
def test_gradients_are_the_same_beside_the_base_and_in_the_weight(rows: int) -> None:
    model, x, tuned = start(dropout=0.0)
    nudge(tuned)
    delta = part(tuned)
    assert delta.prefers_side(1, model.first) and not delta.prefers_side(50, model.first)
    x = torch.randn(rows, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(rows, 8, dtype=torch.float64)
    wanted = (x, delta.lam, delta.gamma)
    y = x @ (model.first.weight + delta.dense()).T + model.first.bias
    found = model.first(x)
    assert torch.allclose(found, y)
    for a, b in zip(torch.autograd.grad(found, wanted, g), torch.autograd.grad(y, wanted, g), strict=True):
        assert torch.allclose(a, b)


def test_bases_are_shared_unit_deviation_and_left_alone() -> None:
    model, x, tuned = start()
    first, second = tuned.parts()
    assert first.bases is second.bases
    before = first.bases.a.clone(), first.bases.b.clone()
    for drawn in before:
        assert abs(drawn.std() - 1) < 1e-2  # bfloat16 numbers, PEFT's
    list(steps(model, x, tuned, 3, decay=0.1))
    assert torch.equal(first.bases.a, before[0]) and torch.equal(first.bases.b, before[1])
    assert not any("bases" in name for name in tuned.tensors())


def test_one_seed_is_one_set_of_bases() -> None:
    one, two, other = RandomBases(3, 8, 12, seed=1), RandomBases(3, 8, 12, seed=1), RandomBases(3, 8, 12, seed=2)
    assert torch.equal(one.a, two.a) and torch.equal(one.b, two.b) and not torch.equal(one.b, other.b)


def test_sparse_bases_hold_three_values_in_the_right_shares() -> None:
    bases = RandomBases(64, 256, 256, seed=0, sparsity=3.0)
    values, counts = bases.b.unique(return_counts=True)
    assert len(values) == 3 and values[1] == 0 and torch.isclose(values[0], -values[2])
    assert torch.allclose(counts / bases.b.numel(), torch.tensor([1 / 6, 2 / 3, 1 / 6]), atol=0.01)


def test_a_larger_rank_of_the_bases_means_fewer_parameters() -> None:
    sizes = [sum(p.numel() for p in start(rank=rank)[2].parameters()) for rank in (1, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] == 2 * 4 * (2 + 8)


def test_many_rows_keep_the_input_and_a_weight_that_is_half_as_large_at_most() -> None:
    model, x, _ = start()
    part(dw.tuned(model)).prefers_side = lambda *_: False
    for repeat, kept in ((1, []), (2, [(8, 12)])):
        rows = x.repeat(repeat, 1, 1).requires_grad_()
        assert saved_shapes(lambda rows=rows: model.first(rows)) == [(2 * repeat, 5, 12), *kept]


def test_a_file_for_other_shapes_is_refused(tmp_path) -> None:
    model, _, _ = start()
    dw.save(model, tmp_path / "adapter")
    with pytest.raises(ValueError):
        dw.load(net(12, 9, 10)[0], tmp_path / "adapter")
