"""SVFT and SVFit: trained entries between the weight's own singular vectors."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.singular import decomposed
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps

PATTERNS = ("plain", "banded", "random")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_the_pattern_changes_between_the_singular_vectors(pattern: str) -> None:
    model, x = net(12, 8, 8)
    weight, base = model.first.weight.detach().clone(), model(x)
    tuned = attach(model, dw.SVFT, pattern=pattern, band=2)
    assert torch.equal(model(x), base)
    list(steps(model, x, tuned, 3))
    delta, (u, _, vh) = part(tuned), decomposed(weight)
    assert torch.allclose(model.first(x), x @ (weight + delta.dense()).T + model.first.bias)
    inner = u.T @ delta.dense().detach() @ vh.T
    assert torch.allclose(u @ inner @ vh, delta.dense())
    i, j = torch.arange(8).unsqueeze(1), torch.arange(8)
    if pattern == "random":
        inside = torch.zeros(64, dtype=torch.bool)
        inside[delta.index.long()] = True
        inside = inside.view(8, 8)
        assert inside.sum() == len(delta.index) == 8 * 5 - 6
    else:
        inside = (i - j).abs() <= (2 if pattern == "banded" else 0)
    assert inner[~inside].abs().max() < 1e-12 and (inner[inside] != 0).all()


def test_a_full_band_reaches_any_target() -> None:
    model, _ = net(8, 8, 8)
    weight = model.first.weight.detach().clone()
    target = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    delta = part(attach(model, dw.SVFT, pattern="banded", band=7))
    assert len(delta.m) == 64
    u, _, vh = decomposed(weight)
    with torch.no_grad():
        delta.m.copy_((u.T @ (target - weight) @ vh.T).flatten())
    assert torch.allclose(weight + delta.dense(), target)


def test_the_largest_products_are_chosen_and_rectangles_refused() -> None:
    model, _ = net(8, 8, 8)
    u, _, vh = decomposed(model.first.weight.detach())
    chosen = part(attach(model, dw.SVFT, pattern="top", band=1)).index.long()
    products = (u.T @ vh.T).flatten()
    assert products[chosen].min() > products[[i for i in range(64) if i not in chosen.tolist()]].max()
    with pytest.raises(ValueError, match="pattern='top' compares inputs with outputs, and first is 8 x 12"):
        attach(net(12, 8, 8)[0], dw.SVFT, pattern="top")


def test_the_authors_start_is_normal_under_half_a_gate() -> None:
    model, x = net(12, 8, 8)
    base = model(x)
    tuned = attach(model, dw.SVFT, pattern="plain", start="normal")
    assert not torch.allclose(model(x), base) and part(tuned).gate == 0
    assert torch.allclose(part(tuned).middle(), part(tuned).m.diag() / 2)
    parameters = tuned.parameters()
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x.requires_grad_(), *parameters))


def test_svfit_shifts_the_first_values_and_all_of_them_are_plain_svft() -> None:
    model, x = net(12, 8, 6)
    weight = model.first.weight.detach().clone()
    tuned = attach(model, dw.SVFit, rank=3)
    nudge(tuned)
    u, s, vh = decomposed(weight)
    expected = u[:, :3] @ torch.diag(part(tuned).shift) @ vh[:3]
    assert torch.allclose(part(tuned).dense(), expected) and part(tuned).shift.numel() == 3
    changed = torch.linalg.svdvals(weight + expected.detach()).sort().values
    assert torch.allclose(changed, (s + torch.cat([part(tuned).shift, torch.zeros(5)])).detach().sort().values)
    twins = []
    for kind in (dw.SVFit, dw.SVFT):
        twin, x = net(12, 8, 6)
        list(steps(twin, x, attach(twin, kind), 3))
        twins.append(twin(x))
    assert torch.equal(*twins)


def test_energy_chooses_the_fewest_values_that_hold_it() -> None:
    model, _ = net(12, 8, 6)
    with torch.no_grad():
        u, _, vh = decomposed(model.first.weight)
        model.first.weight.copy_(u @ torch.diag(torch.tensor([3.0, 2, 1, 0.1, 0.1, 0.1, 0.1, 0.1]).double()) @ vh)
    assert len(part(attach(model, dw.SVFit, energy=0.99)).shift) == 3
    with pytest.raises(ValueError, match="both choose the rank; give one"):
        dw.SVFit(rank=2, energy=0.9)


def test_files_hold_no_basis_and_another_base_is_refused(tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.SVFit)
    nudge(tuned)
    assert sum(t.numel() for t in tuned.tensors().values()) == 2 * (8 + 6)
    dw.save(model, tmp_path / "adapter")
    twin, _ = net(12, 8, 6)
    dw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(x), model(x))
    other, _ = net(12, 8, 6, seed=5)
    with pytest.raises(ValueError):
        dw.load(other, tmp_path / "adapter")


def test_training_keeps_nothing_as_wide_as_the_layer() -> None:
    model, x = net(24, 8, 20)
    attach(model, dw.SVFit)
    x.requires_grad_()
    assert [shape for shape in saved_shapes(lambda: model.first(x)) if len(shape) > 1] == [(10, 8)]
