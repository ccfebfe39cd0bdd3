"""LoLDU trains pivots between the weight's own triangular factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.method import weight_at
from deltaworks.core.operators.pivots import decomposed
from tests.families import FAMILIES
from tests.methods.toys import assert_stored_and_merged, attach, net, nudge, part, saved_shapes, steps

STARTS = ["uniform", "normal", "constant", "zeros", "ones"]
MODES = [{"train_sigma": True}, *({"start": start} for start in STARTS), {"train_sigma": True, "start": "normal"}]


def half(model: nn.Module, path) -> tuple[nn.Module, dw.Tuned]:
    """A copy of the base in bfloat16 with the adapter loaded."""
    twin = dw.detach(copy.deepcopy(model)).bfloat16()
    return twin, dw.load(twin, path)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_the_factors_reconstruct_the_weight_with_rows_permuted_on_the_output_side(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rank = min(shape)
    lower, pivots, upper, rows = decomposed(weight, rank)
    assert torch.allclose(lower @ torch.diag(pivots) @ upper, weight)
    assert torch.allclose(upper.diagonal(), torch.ones(rank, dtype=torch.float64)) and upper.tril(-1).abs().max() == 0
    assert (lower.abs() <= 1 + 1e-12).all() and (lower == 1).any(0).all()
    assert (lower[rows].diagonal() == 1).all() and lower[rows].triu(1).abs().max() == 0


def test_the_output_does_not_change_at_the_start_and_only_the_pivots_train() -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.LoLDU, rank=4)
    assert torch.equal(model(x), base)
    assert [(name.rsplit(".", 1)[-1], p.numel()) for name, p in tuned.named_parameters()] == [("z", 4), ("z", 4)]
    before = part(tuned).lower.clone()
    list(steps(model, x, tuned, 3))
    assert torch.equal(part(tuned).lower, before) and not torch.allclose(model(x), base)


def test_the_change_is_that_of_the_pivots() -> None:
    model, x = net(12, 8, 6)
    weight, bias = model.first.weight.detach(), model.first.bias.detach()
    tuned = attach(model, dw.LoLDU, rank=4, alpha=2.0)
    nudge(tuned)
    delta = part(tuned)
    lower, pivots, upper, _ = decomposed(weight, 4)
    expected = weight + 0.5 * lower @ torch.diag(delta.z - pivots) @ upper
    assert torch.allclose(model.first(x), x @ expected.T + bias)
    residual = weight - 0.5 * lower @ torch.diag(pivots) @ upper
    assert torch.allclose(expected, residual + 0.5 * lower @ torch.diag(delta.z) @ upper)


def test_files_hold_the_pivots_and_where_they_lay_and_loading_finds_the_factors_again(tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.LoLDU, rank=4)
    nudge(tuned)
    assert [(name.rsplit(".", 1)[-1], t.numel()) for name, t in tuned.tensors().items()] == [
        ("z", 4),
        ("start", 4),
        ("rows", 4),
    ] * 2
    dw.save(model, tmp_path / "adapter")
    twin, _ = net(12, 8, 6)
    dw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(x), model(x))


def test_a_vanishing_pivot_neither_blows_up_nor_trains(tmp_path) -> None:
    model, x = net(12, 8, 6)
    with torch.no_grad():
        model.first.weight[3:] = torch.randn(5, 3, dtype=torch.float64) @ model.first.weight[:3]
    tuned = attach(model, dw.LoLDU, rank=8)
    model(x).square().sum().backward()
    delta = part(tuned)
    assert (delta.start == 0).sum() == 5 and delta.upper.abs().max() < 100
    assert (delta.z.grad[delta.start == 0] == 0).all() and (delta.z.grad[delta.start != 0] != 0).all()
    dw.save(model, tmp_path / "adapter")
    _, loaded = half(model, tmp_path / "adapter")  # where rounding leaves something in their place
    assert (part(loaded).upper[delta.start == 0] == 0).all() and (part(loaded).upper != 0).any()


def test_a_feature_that_the_weight_does_not_read_leaves_no_pivot() -> None:
    model, x = net(12, 8, 6)
    with torch.no_grad():
        model.first.weight[:, 1] = 0
    base = model(x)
    tuned = attach(model, dw.LoLDU, rank=8)
    assert torch.equal(model(x), base) and (part(tuned).start == 0).tolist() == [k == 1 for k in range(8)]


@pytest.mark.parametrize("settings", [{}, {"train_sigma": True, "start": "ones"}])
@pytest.mark.parametrize("size", [0.0, 0.1])
def test_a_copy_of_the_base_in_bfloat16_gets_the_change_that_was_trained(size: float, settings, tmp_path) -> None:
    model, x = net(12, 8, 6)
    model, x = model.float(), x.float()
    with torch.no_grad():  # two rows that are one in bfloat16, where LU would take the first
        model.first.weight[2, 0], model.first.weight[5, 0] = 0.5, 0.5001
    assert decomposed(model.first.weight, 1)[3] == 5 and decomposed(model.first.weight.bfloat16(), 1)[3] == 2
    tuned = attach(model, dw.LoLDU, rank=4, **settings)
    nudge(tuned, size)
    dw.save(model, tmp_path / "adapter")
    twin, loaded = half(model, tmp_path / "adapter")
    for ours, theirs in zip(tuned.parts(), loaded.parts(), strict=True):
        assert torch.equal(ours.rows, theirs.rows) and (ours.dense().norm() > 0) == (size > 0)
        assert (ours.dense() - theirs.dense()).norm() <= 0.03 * ours.dense().norm()
    expected = nn.functional.linear(x, twin.first.weight.float() + part(tuned).dense(), twin.first.bias.float())
    assert torch.allclose(twin.first(x.bfloat16()).float(), expected, atol=0.02)


@pytest.mark.parametrize("settings", [{}, {"train_sigma": True}, {"start": "ones"}])
def test_a_base_with_other_pivots_is_refused(settings: dict, tmp_path) -> None:
    model, _ = net(12, 8, 6)
    model = model.float()
    with torch.no_grad():  # what is left after the first pivot is below the precision of bfloat16
        model.first.weight.copy_(torch.outer(torch.linspace(0.5, 1, 8), model.first.weight[0]))
        model.first.weight.add_(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), alpha=1e-4)
    nudge(attach(model, dw.LoLDU, rank=4, **settings))
    dw.save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="the pivots of first are not those the adapter was trained from"):
        half(model, tmp_path / "adapter")


def test_training_keeps_nothing_as_wide_as_the_layer() -> None:
    model, x = net(24, 20, 6)
    attach(model, dw.LoLDU, rank=4)
    x.requires_grad_()
    assert [shape for shape in saved_shapes(lambda: model.first(x)) if len(shape) > 1] == [(10, 4)]


@pytest.mark.parametrize("settings", [{}, {"train_sigma": True, "start": "normal"}])
def test_stacked_experts_have_factors_of_their_own(settings: dict, tmp_path) -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.LoLDU(rank=4, **settings), seed=0)
    nudge(tuned)
    dw.save(model, tmp_path / "adapter")
    twin, _ = FAMILIES["mixtral"]()
    loaded = dw.load(twin, tmp_path / "adapter")
    kept = {"z", "start", "rows", *(("sigma", "pivots") if settings else ())}
    assert {name.rsplit(".", 1)[-1] for name in loaded.tensors()} == kept
    expected = model(**batch).logits
    assert torch.equal(twin(**batch).logits, expected)
    dw.merge(model)
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("settings", MODES)
def test_every_mode_starts_unchanged_trains_what_is_counted_and_is_stored_and_merged(settings: dict, tmp_path) -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.LoLDU, rank=7, alpha=0.7, **settings)
    assert torch.equal(model(x), base)
    for delta in tuned.parts():
        trained = sum(p.numel() for p in delta.parameters() if p.requires_grad)
        assert trained == tuned.method.count(weight_at(model, delta.site))
    model(x).square().sum().backward()
    assert all((p.grad != 0).all() for p in tuned.parameters())
    nudge(tuned)
    assert_stored_and_merged(model, net(12, 8, 6)[0], x, tmp_path)


def test_a_trained_scale_multiplies_z_and_leaves_the_residual() -> None:
    model, x = net(12, 8, 6)
    weight = model.first.weight.detach()
    tuned = attach(model, dw.LoLDU, rank=4, alpha=2.0, train_sigma=True)
    delta = part(tuned)
    assert [tuple(p.shape) for p in delta.parameters()] == [(4,), (1,)] and delta.sigma.item() == 0.5
    lower, pivots, upper, _ = decomposed(weight, 4)
    residual = weight - 0.5 * lower @ torch.diag(pivots) @ upper
    with torch.no_grad():
        delta.sigma.fill_(0.8)
        delta.z.mul_(1.1)
    expected = residual + 0.8 * lower @ torch.diag(1.1 * pivots) @ upper
    assert torch.allclose(model.first(x), x @ expected.T + model.first.bias)


@pytest.mark.parametrize("start", STARTS)
def test_other_starts_are_the_authors_and_are_what_is_subtracted(start: str) -> None:
    model, x = net(90, 80, 6)
    weight = model.first.weight.detach()
    delta = part(attach(model, dw.LoLDU, rank=80, start=start))
    lower, d, upper, _ = decomposed(weight, 80)
    mean, z0 = d.mean(), delta.start.clone()
    assert torch.equal(delta.z, z0) and torch.equal(delta.pivots, d) and not torch.allclose(z0, d)
    match start:
        case "uniform":
            assert 0.4 * mean.abs() < z0.abs().max() <= 0.5 * mean.abs() and z0.min() < 0 < z0.max()
        case "normal":
            assert (z0.mean() - mean).abs() < 0.5 * d.std() and 0.7 < z0.std() / d.std() < 1.4
        case "constant":
            assert torch.allclose(z0, mean)
        case _:
            assert (z0 == float(start == "ones")).all()
    with torch.no_grad():
        delta.z.add_(0.3)
    expected = weight + 0.3 * lower @ upper
    assert torch.allclose(model.first(x), x @ expected.T + model.first.bias)


def test_drawn_starts_differ_by_seed_alone_and_one_pivot_has_no_spread() -> None:
    first, same, other = (
        part(attach(net(12, 8, 6)[0], dw.LoLDU, seed=seed, rank=4, start="normal")).z for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    alone = part(attach(net(12, 8, 6)[0], dw.LoLDU, rank=1, start="normal"))
    assert torch.equal(alone.z, alone.pivots)


def test_a_vanishing_pivot_stays_zero_whatever_the_start() -> None:
    model, _ = net(12, 8, 6)
    with torch.no_grad():
        model.first.weight[3:] = 0
    tuned = attach(model, dw.LoLDU, rank=8, start="ones", train_sigma=True)
    assert part(tuned).z.tolist() == [1.0] * 3 + [0.0] * 5
    nudge(tuned)
    assert (part(tuned).dense()[3:] == 0).all() and (part(tuned).dense()[:3] != 0).any()
