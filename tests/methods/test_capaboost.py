"""CapaBoost: masked copies of one method raise its rank and share its parameters."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part

LORA = {"rank": 2, "alpha": 4.0}


def test_it_starts_as_the_base_with_loras_parameters() -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.CapaBoost, inner=LORA)
    assert torch.equal(model(x), base)
    assert sum(p.numel() for p in tuned.parameters()) == 2 * (12 + 8 + 8 + 6)


def test_the_rank_of_the_change_is_copies_times_loras_and_the_sum_of_masked_products() -> None:
    model, x = net(12, 8, 6)
    base = model.first(x)
    tuned = attach(model, dw.CapaBoost, inner=LORA, copies=3, density=0.4)
    nudge(tuned)
    delta = part(tuned)
    assert int(torch.linalg.matrix_rank(delta.dense())) == 6 == delta.rank
    masks = zip(delta.a_masks, delta.b_masks, strict=True)
    expected = 2.0 * sum((delta.b * mask_b) @ (delta.a * mask_a) for mask_a, mask_b in masks)
    assert torch.allclose(delta.dense(), expected) and torch.allclose(model.first(x), base + x @ expected.T)
    assert all(int(mask.sum()) == int(0.4 * mask.numel()) for mask in (*delta.a_masks, *delta.b_masks))


def test_density_one_is_lora_at_copies_times_the_scale() -> None:
    (model, x), (twin, _) = net(12, 8, 6), net(12, 8, 6)
    boosted = attach(model, dw.CapaBoost, inner=LORA, density=1.0)
    lora = attach(twin, dw.LoRA, rank=2, alpha=8.0)
    for tuned in (boosted, lora):
        nudge(tuned)
    assert torch.allclose(model(x), twin(x), atol=1e-12)


def test_masks_differ_between_copies_matrices_and_layers_and_come_back_from_a_file(tmp_path) -> None:
    model, x = net(8, 8, 8)
    tuned = attach(model, dw.CapaBoost, inner=LORA)
    first, second = tuned.parts()
    assert not torch.equal(first.a_masks[0], first.a_masks[1])
    assert not torch.equal(first.a_masks, second.a_masks)
    assert not any(name.endswith("_masks") for name in tuned.tensors())
    nudge(tuned)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = net(8, 8, 8)
    loaded = list(dw.load(fresh, tmp_path / "adapter").parts())
    assert torch.equal(loaded[0].a_masks, first.a_masks) and torch.equal(loaded[1].b_masks, second.b_masks)
    assert torch.equal(fresh(x), model(x))


def test_entries_masked_everywhere_have_no_gradient() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.CapaBoost, inner=LORA, density=0.3)
    nudge(tuned)
    model(x).square().sum().backward()
    delta = part(tuned)
    hidden = ~delta.a_masks.any(0)
    assert hidden.any() and delta.a.grad[hidden].abs().max() == 0 and (delta.a.grad[~hidden] != 0).all()


def test_two_of_four() -> None:
    model, _ = net(12, 8, 4)
    delta = part(attach(model, dw.CapaBoost, inner=LORA, pattern="nm"))
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in delta.a_masks)
    with pytest.raises(ValueError, match="multiple of 4"):
        attach(net(3, 3, 3)[0], dw.CapaBoost, inner={"rank": 1}, pattern="nm")
    with pytest.raises(ValueError, match="keeps half"):
        dw.CapaBoost(pattern="nm", density=0.3)


@pytest.mark.parametrize(
    ("over", "inner"), [("vera", {"rank": 4}), ("lora_fa", {"rank": 2}), ("c3a", {"block": 2}), ("fourierft", {"n": 9})]
)
def test_it_boosts_other_methods(over: str, inner: dict, tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.CapaBoost, over=over, inner=inner)
    nudge(tuned)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters())
    single, _ = net(12, 8, 6)
    count = sum(p.numel() for p in dw.attach(single, dw.method(over, on=torch.nn.Linear, **inner)).parameters())
    assert sum(p.numel() for p in tuned.parameters()) == count
    expected = model(x)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = net(12, 8, 6)
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), expected)
    dw.merge(model)
    assert torch.allclose(model(x), expected)


def test_what_masks_would_break_is_refused_by_name() -> None:
    for over in ("pissa", "dora", "adalora", "lora_ga", "capaboost"):
        with pytest.raises(ValueError, match=over):
            attach(net(12, 8, 6)[0], dw.CapaBoost, over=over)
