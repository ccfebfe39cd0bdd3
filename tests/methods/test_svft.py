"""SVFT and SVFit: trained entries between the weight's own singular vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import deltaworks as dw
from deltaworks.core.costs import size_on
from deltaworks.core.operators.singular import SparseMiddle, decomposed
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps

PATTERNS = ("plain", "banded", "random")
STARTS = ("zeros", "normal")
SPARSE = [("plain", "normal"), *((pattern, start) for pattern in ("banded", "random", "top") for start in STARTS)]


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


def beside(pattern: str, start: str = "zeros") -> tuple[torch.nn.Module, SparseMiddle]:
    """A network whose first layer has a sparse M off its start, acting beside the weight."""
    model, _ = net(8, 8, 8) if pattern == "top" else net(12, 8, 6)
    settings = {"pattern": pattern, "start": start} | ({} if pattern == "plain" else {"band": 1})
    tuned = attach(model, dw.SVFT, on="first", **settings)
    nudge(tuned, 0.3)
    part(tuned).prefers_side = lambda *_: True
    return model, part(tuned)


@pytest.mark.parametrize("tokens", [2, 40], ids=["entry by entry", "all of M"])
@pytest.mark.parametrize(("pattern", "start"), SPARSE)
def test_beside_the_weight_it_is_the_dense_change(pattern: str, start: str, tokens: int) -> None:
    model, delta = beside(pattern, start)
    layer, generator = model.first, torch.Generator().manual_seed(3)
    x = torch.randn(1, tokens, layer.in_features, dtype=torch.float64, generator=generator, requires_grad=True)
    g = torch.randn(1, tokens, 8, dtype=torch.float64, generator=generator)
    inputs = [x, *delta.parameters()]
    expected = torch.nn.functional.linear(x, layer.weight + delta.dense(), layer.bias)
    wanted = torch.autograd.grad(expected, inputs, g)
    if tokens == 2:
        delta.middle = None  # so that making it fails
    found = layer(x)
    assert torch.allclose(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, g), wanted, strict=True):
        assert torch.allclose(ours, theirs)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected)


def test_half_precision_stays_what_it_is_and_agrees() -> None:
    delta = beside("banded")[1].bfloat16()
    delta.m.data = delta.m.data.float()
    x = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert delta.side(x).dtype == torch.bfloat16
    assert torch.allclose(delta.side(x).float(), x.float() @ delta.float().dense().T, atol=2e-2)


def test_one_token_costs_three_products_of_one_vector() -> None:
    model, delta = beside("banded")
    del delta.prefers_side
    x = torch.randn(1, 1, 12, dtype=torch.float64)
    products = 2 * (12 * 8 + 12 * 8 + 8 * 8)  # with W, V and U
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.first(x)
    assert counted.get_total_flops() == products
    with FlopCounterMode(display=False) as counted:
        model.first(x.requires_grad_()).sum().backward()
    assert counted.get_total_flops() == 2 * products


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("pattern", [*PATTERNS, "top"])
def test_sizes_are_known_without_weights(pattern: str, start: str) -> None:
    method = dw.SVFT(on=torch.nn.Linear, pattern=pattern, start=start)
    model, _ = net(8, 8, 8)
    told = size_on(copy.deepcopy(model).to("meta"), method)
    summary = dw.attach(model, method).summary()
    assert (told["trainable"], told["saved_bytes"]) == (summary.trainable, summary.stored_bytes)


def test_what_no_weights_can_say_is_said_in_a_line() -> None:
    for method, reason in (
        (dw.SVFT(on=torch.nn.Linear, pattern="top"), "pattern='top' compares inputs with outputs, and first is 8 x 12"),
        (dw.SVFit(on=torch.nn.Linear, energy=0.9), "svfit: energy needs singular values"),
    ):
        assert reason in size_on(net(12, 8, 6)[0].to("meta"), method)["reason"]


def test_settings_of_other_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="band=3 is for pattern='banded' or 'random' or 'top', not plain"):
        dw.SVFT(band=3)
    for pattern in ("plain", "banded", "top"):
        with pytest.raises(ValueError, match=f"seed=1 is for pattern='random', not {pattern}"):
            dw.SVFT(pattern=pattern, seed=1)
