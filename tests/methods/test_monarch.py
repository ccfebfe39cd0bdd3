"""Monarch matrices: the product, the projection, both modes."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.experts import PerExpert
from deltaworks.core.operators.monarch import Monarch, Replaced, projected
from deltaworks.core.part import in_place
from deltaworks.model.anatomy import Site
from deltaworks.model.weights import Weight
from tests.families import FAMILIES
from tests.methods.resuming import trained
from tests.methods.toys import assert_stored_and_merged, attach, net, nudge, part, saved_shapes, steps

CASES = [(12, 12, 3, 4, 1), (12, 20, 4, 2, 2), (10, 7, 3, 2, 2), (6, 6, 2, 2, 3)]


def made(out: int, fan_in: int, k: int, l: int, r: int, **settings) -> Monarch:
    g = torch.Generator().manual_seed(0)
    s, p = -(-out // l), -(-fan_in // k)
    w1 = torch.randn(k, r * l, p, dtype=torch.float64, generator=g)
    return Monarch(w1, torch.randn(l, s, k * r, dtype=torch.float64, generator=g), out, fan_in, **settings)


@pytest.mark.parametrize("case", CASES)
def test_every_entry_is_the_formula_and_the_fast_product_agrees(case: tuple[int, ...]) -> None:
    out, fan_in, _, l, r = case
    delta = made(*case)
    m, p = delta.dense(), delta.w1.shape[2]
    for i in range(out):
        for j in range(fan_in):
            s, own, kk, pp = i // l, i % l, j // p, j % p
            entry = sum(delta.w2[own, s, kk * r + t] * delta.w1[kk, t * l + own, pp] for t in range(r))
            assert torch.allclose(m[i, j], entry)
    x = torch.randn(2, 3, fan_in, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, out, dtype=torch.float64)
    inputs = (x, delta.w1, delta.w2)
    fast, dense = delta.side(x), x @ delta.dense().T
    assert torch.allclose(fast, dense)
    for a, b in zip(*(torch.autograd.grad(y, inputs, g) for y in (fast, dense)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("case", CASES)
def test_projecting_a_monarch_matrix_gives_it_back(case: tuple[int, ...]) -> None:
    out, fan_in, k, l, r = case
    m = made(*case).dense()
    assert torch.allclose(Monarch(*projected(m, k, l, r), out, fan_in).dense(), m)


def test_the_projection_drops_the_tails_and_is_a_minimum() -> None:
    dense = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta = Monarch(*projected(dense, 4, 2, 2), 12, 20)
    tails = sum(
        torch.linalg.svdvals(dense[l::2, 5 * k : 5 * k + 5])[2:].square().sum() for l in range(2) for k in range(4)
    )
    error = (delta.dense() - dense).square().sum()
    assert torch.allclose(error, tails)
    error.backward()
    assert max(p.grad.abs().max() for p in delta.parameters()) < 1e-12
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    assert (delta.dense() - dense).square().sum() > error


def test_the_rank_can_be_full() -> None:
    assert torch.linalg.matrix_rank(made(12, 12, 3, 4, 1).dense()) == 12


def test_beside_the_weight_it_starts_at_zero_and_in_its_place_at_the_projection() -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    attach(model, dw.Monarch)
    assert torch.equal(model(x), base)
    model, x = net(12, 8, 6)
    weight, bias = model.first.weight.detach().clone(), model.first.bias
    tuned = attach(model, dw.Monarch, mode="project", blocks=2, rank=2)
    delta = part(tuned)
    assert torch.allclose(model.first(x), x @ Monarch(*projected(weight, 2, 2, 2), 8, 12).dense().T + bias)
    before = (model(x) - base).square().mean()
    list(steps(model, x, tuned, 3))
    output = model(x)
    assert torch.allclose(model.first(x), x @ delta.dense().T + bias) and before > 0
    dw.merge(model)
    assert torch.allclose(model(x), output)


def test_a_full_projection_changes_nothing_even_in_part_of_a_fused_layer() -> None:
    model, batch = FAMILIES["gpt2"]()
    base = model(**batch).logits
    tuned = dw.attach(model, dw.Monarch(mode="project", rank=64, on=["attention.query", "mlp"]), seed=0)
    assert torch.allclose(model(**batch).logits, base, atol=1e-4)
    nudge(tuned)
    assert not torch.allclose(model(**batch).logits, base, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "sizes", "shapes"),
    [
        ({}, (32, 32), ((4, 4, 8), (4, 8, 4))),
        ({"mode": "project"}, (32, 32), ((4, 8, 8), (4, 8, 8))),
        ({"mode": "project", "rank": 1}, (32, 32), ((4, 4, 8), (4, 8, 4))),
        ({"mode": "project", "blocks": 2}, (10, 7), ((2, 4, 5), (2, 4, 4))),
        ({"mode": "project", "blocks": [4, 3]}, (12, 10), ((4, 3, 3), (3, 4, 4))),
        ({"blocks": 3, "rank": 2}, (10, 7), ((3, 6, 4), (3, 3, 6))),
        ({"blocks": [3, 2], "rank": 9}, (12, 20), ((3, 8, 4), (2, 10, 12))),
    ],
)
def test_the_rank_is_the_modes_own_and_the_count_that_of_the_factors(settings, sizes, shapes) -> None:
    model, _ = net(*sizes, 4)
    tuned = attach(model, dw.Monarch, on="first", **settings)
    assert (part(tuned).w1.shape, part(tuned).w2.shape) == shapes
    assert sum(p.numel() for p in tuned.parameters()) == tuned.method.count(Weight(model.first))


def test_the_papers_sizes() -> None:
    weight = Weight(torch.nn.Linear(768, 768, device="meta"))
    assert dw.Monarch(mode="project").count(weight) == 294_912
    assert dw.Monarch(mode="project", blocks=[32, 24]).count(weight) == 43_008
    assert dw.Monarch(mode="project", blocks=[32, 24], rank=2).count(weight) == 2 * 43_008


@pytest.mark.parametrize("mode", ["delta", "project"])
def test_numbers_of_blocks_may_differ(mode: str) -> None:
    model, x = net(48, 40, 6)
    weight = model.first.weight.detach().clone()
    tuned = attach(model, dw.Monarch, mode=mode, blocks=[3, 2], rank=1)
    nudge(tuned)
    changed = part(tuned).dense() + (weight if mode == "delta" else 0)
    assert torch.allclose(model.first(x), x @ changed.T + model.first.bias)


@pytest.mark.parametrize("blocks", [0, True, [4], [4, 0], [4, 2, 1], "4", None])
def test_blocks_are_a_number_or_two(blocks) -> None:
    with pytest.raises(ValueError, match="it must be a whole number of at least 1, or a list of two of them, K and L"):
        dw.Monarch(blocks=blocks)


def test_settings_of_the_other_mode_are_refused() -> None:
    with pytest.raises(ValueError, match="dropout=0.1 is for mode='delta'"):
        dw.Monarch(mode="project", dropout=0.1)
    with pytest.raises(ValueError, match="densify=0.9 is for mode='project'"):
        dw.Monarch(densify=0.9)


def test_after_its_share_of_the_steps_it_goes_on_as_a_dense_matrix(tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.Monarch, mode="project", blocks=2, rank=1, densify=0.5)
    optimizer = torch.optim.Adam(tuned.parameter_groups(0.1))
    rules = tuned.run(4, optimizer=optimizer)
    rules.emit("attached")

    def rank() -> int:
        matrix = part(tuned).fold(model.first.weight.detach())
        return max(int(torch.linalg.matrix_rank(matrix[l::2, 6 * k : 6 * k + 6])) for l in (0, 1) for k in (0, 1))

    for kind, reached in ((Monarch, 1), (Replaced, 1), (Replaced, 4), (Replaced, 4)):
        rules.step(lambda: model(x).square().sum())
        assert type(part(tuned)) is kind and rank() == reached
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in tuned.parameters()]
    assert_stored_and_merged(model, net(12, 8, 6)[0], x, tmp_path)
    dw.detach(model)
    assert torch.equal(model.first.weight, net(12, 8, 6)[0].first.weight)


def test_multiplying_out_changes_nothing() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.Monarch, mode="project", blocks=2, rank=1, densify=0.5)
    nudge(tuned)
    before, rules = model(x), tuned.run(2)
    rules.emit("step_end")
    assert type(part(tuned)) is Replaced and torch.allclose(model(x), before)


@pytest.mark.parametrize(("family", "stops"), [("llama", (1, 3, 4)), ("mixtral", (2, 3))])
def test_densified_it_resumes_bit_for_bit(family: str, stops: tuple[int, ...], tmp_path) -> None:
    method = dw.Monarch(mode="project", densify=0.5)
    whole, _, _ = trained(method, tmp_path, family, steps=6)
    for stop in stops:
        resumed, _, _ = trained(method, tmp_path, family, steps=6, stop=stop)
        assert list(whole) == list(resumed), stop
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), stop


def test_training_keeps_the_input_only() -> None:
    model, x = net(64, 48, 32)
    attach(model, dw.Monarch)
    x.requires_grad_()
    assert saved_shapes(lambda: model.first(x)) == [(2, 5, 64)]


def test_what_took_a_weights_place_still_does_as_a_whole_matrix_and_in_a_stack() -> None:
    part = Monarch(torch.ones(2, 2, 4), torch.ones(2, 4, 2), 8, 8, replaces=True)
    site = Site("x", None, "linear")
    assert all(in_place(one, site) for one in (part, part.multiplied_out(), PerExpert([part, part])))
