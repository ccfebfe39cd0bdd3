"""LoLDU trains pivots between the weight's own triangular factors."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.pivots import decomposed
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_the_factors_reconstruct_the_weight_with_rows_permuted_on_the_output_side(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rank = min(shape)
    lower, pivots, upper = decomposed(weight, rank)
    assert torch.allclose(lower @ torch.diag(pivots) @ upper, weight)
    assert torch.allclose(upper.diagonal(), torch.ones(rank, dtype=torch.float64)) and upper.tril(-1).abs().max() == 0
    assert (lower.abs() <= 1 + 1e-12).all() and (lower == 1).any(0).all()


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
    lower, pivots, upper = decomposed(weight, 4)
    expected = weight + 0.5 * lower @ torch.diag(delta.z - pivots) @ upper
    assert torch.allclose(model.first(x), x @ expected.T + bias)
    residual = weight - 0.5 * lower @ torch.diag(pivots) @ upper
    assert torch.allclose(expected, residual + 0.5 * lower @ torch.diag(delta.z) @ upper)


def test_files_hold_the_pivots_alone_and_loading_finds_the_factors_again(tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.LoLDU, rank=4)
    nudge(tuned)
    assert sum(t.numel() for t in tuned.tensors().values()) == 8
    dw.save(model, tmp_path / "adapter")
    twin, _ = net(12, 8, 6)
    dw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(x), model(x))


def test_a_vanishing_pivot_neither_blows_up_nor_trains() -> None:
    model, x = net(12, 8, 6)
    with torch.no_grad():
        model.first.weight[3:] = torch.randn(5, 3, dtype=torch.float64) @ model.first.weight[:3]
    tuned = attach(model, dw.LoLDU, rank=8)
    model(x).square().sum().backward()
    delta = part(tuned)
    assert (delta.start == 0).sum() == 5 and delta.upper.abs().max() < 100
    assert (delta.z.grad[delta.start == 0] == 0).all() and (delta.z.grad[delta.start != 0] != 0).all()


def test_training_keeps_nothing_as_wide_as_the_layer() -> None:
    model, x = net(24, 20, 6)
    attach(model, dw.LoLDU, rank=4)
    x.requires_grad_()
    assert [shape for shape in saved_shapes(lambda: model.first(x)) if len(shape) > 1] == [(10, 4)]


def test_stacked_experts_have_factors_of_their_own(tmp_path) -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.LoLDU(rank=4), seed=0)
    nudge(tuned)
    dw.save(model, tmp_path / "adapter")
    twin, _ = FAMILIES["mixtral"]()
    loaded = dw.load(twin, tmp_path / "adapter")
    assert all(name.endswith("z") for name in loaded.tensors())
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
