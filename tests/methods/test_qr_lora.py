"""QR-LoRA: a trained trapezoid behind frozen principal columns."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.method import weight_at
from tests.families import FAMILIES
from tests.methods.toys import assert_stored_and_merged, attach, net, nudge, part, saved_shapes, steps


def test_it_starts_unchanged_and_every_entry_has_a_gradient() -> None:
    model, x = net()
    base = model(x)
    tuned = attach(model, dw.QRLoRA, rank=3)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    assert all((p.grad != 0).all() for p in tuned.parameters())


def test_q_is_orthonormal_spans_the_principal_columns_and_stays() -> None:
    model, x = net(12, 8, 6)
    u, _, _ = torch.linalg.svd(model.first.weight.detach())
    tuned = attach(model, dw.QRLoRA, rank=3)
    q = part(tuned).q.clone()
    assert torch.allclose(q.T @ q, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(q @ q.T, u[:, :3] @ u[:, :3].T)
    list(steps(model, x, tuned, 3, decay=0.1))
    assert torch.equal(part(tuned).q, q)
    change = part(tuned).dense()
    assert change.norm() > 1e-3 and torch.allclose(q @ q.T @ change, change)


def test_what_is_below_the_diagonal_stays_zero() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.QRLoRA, rank=3)
    list(steps(model, x, tuned, 3))
    r, _ = part(tuned).factors()
    assert r.tril(-1).abs().max() == 0 and (r.triu() != 0).sum() == 3 * 12 - 3
    assert part(tuned).r.numel() == 3 * 12 - 3


def test_it_is_the_qr_decomposition_of_the_best_approximation() -> None:
    model, _ = net(12, 8, 6)
    u, s, vh = torch.linalg.svd(model.first.weight.detach())
    q, r = torch.linalg.qr(u[:, :3] @ (s[:3, None] * vh[:3]))
    q = q[:, :3] * r.diagonal()[:3].sign()
    assert torch.allclose(part(attach(model, dw.QRLoRA, rank=3)).q, q)


def test_two_adapters_of_one_base_share_q_and_add_up() -> None:
    model, x = net(12, 8, 6)
    with dw.disable(model):
        base = model.first(x)
    first = attach(model, dw.QRLoRA, rank=3)
    second = dw.attach(model, first.method, name="second", seed=5)
    nudge(first, seed=1)
    nudge(second, seed=2)
    assert torch.equal(part(first).q, part(second).q)
    together = 0.7 * part(first).r + 0.4 * part(second).r
    expected = 0.7 * part(first).dense() + 0.4 * part(second).dense()
    with torch.no_grad():
        part(first).r.copy_(together)
    assert torch.allclose(part(first).dense(), expected)
    dw.activate(model, "default")
    assert torch.allclose(model.first(x) - base, x @ expected.T)


def test_training_keeps_the_input_and_no_matrix_of_the_layer() -> None:
    model, x = net(24, 20, 6)
    attach(model, dw.QRLoRA, rank=2)
    x.requires_grad_()
    assert (20, 24) not in saved_shapes(lambda: model.first(x))
    assert [shape for shape in saved_shapes(lambda: model.first(x)) if shape[0] in (10, 5) or len(shape) > 2] == [
        (2, 5, 24)
    ]


def test_in_full_both_factors_train_from_the_principal_part_which_is_subtracted() -> None:
    model, x = net(12, 8, 6)
    base, (u, s, vh) = model(x), torch.linalg.svd(model.first.weight.detach())
    tuned = attach(model, dw.QRLoRA, train="full", rank=3, alpha=1.5)
    delta = part(tuned)
    assert torch.allclose(model(x), base) and delta.dense().abs().max() == 0
    assert torch.allclose(0.5 * delta.b @ delta.a, u[:, :3] @ (s[:3, None] * vh[:3]))
    assert torch.allclose(delta.b.T @ delta.b, torch.eye(3, dtype=torch.float64))
    assert delta.a.tril(-1).abs().max() == 0 and (delta.a.diagonal() > 0).all()
    start = delta.a.clone(), delta.b.clone()
    model(x).square().sum().backward()
    assert (delta.a.grad != 0).all() and (delta.b.grad != 0).all()
    nudge(tuned)
    residual = model.first.weight - 0.5 * start[1] @ start[0]
    expected = x @ (residual + 0.5 * delta.b @ delta.a).T + model.first.bias
    assert torch.allclose(model.first(x), expected)


def test_a_random_start_is_small_and_trapezoidal_and_openly_changes_the_output() -> None:
    model, x = net(200, 150, 6)
    base = model(x)
    tuned = attach(model, dw.QRLoRA, start="random")
    assert not torch.allclose(model(x), base) and not tuned.method.exact_at_start
    r, _ = part(tuned).factors()
    assert r.tril(-1).abs().max() == 0 and 0.0095 < part(tuned).r.std() < 0.0105 and part(tuned).r.mean().abs() < 5e-4
    other = attach(net(200, 150, 6)[0], dw.QRLoRA, seed=1, start="random")
    assert torch.equal(part(other).q, part(tuned).q) and not torch.equal(part(other).r, part(tuned).r)
    assert dw.QRLoRA().exact_at_start and dw.QRLoRA(train="full").exact_at_start
    assert not dw.QRLoRA(overrides={"first": {"start": "random"}}).exact_at_start


def test_what_trains_in_full_has_no_start_of_its_own() -> None:
    with pytest.raises(ValueError, match="qr_lora: start=random is for train='delta', not full"):
        dw.QRLoRA(train="full", start="random")


@pytest.mark.parametrize("settings", [{"train": "full"}, {"start": "random"}])
def test_every_mode_is_counted_stored_and_merged(settings: dict, tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.QRLoRA, rank=7, alpha=3.0, **settings)
    for delta in tuned.parts():
        trained = sum(p.numel() for p in delta.parameters() if p.requires_grad)
        assert trained == tuned.method.count(weight_at(model, delta.site))
    nudge(tuned)
    assert_stored_and_merged(model, net(12, 8, 6)[0], x, tmp_path)


@pytest.mark.parametrize("settings", [{"train": "full"}, {"start": "random"}])
def test_stacked_experts_are_decomposed_one_by_one(settings: dict, tmp_path) -> None:
    model, batch = FAMILIES["mixtral"]()
    base = model(**batch).logits
    tuned = dw.attach(model, dw.QRLoRA(rank=4, **settings), seed=0)
    assert torch.allclose(model(**batch).logits, base, atol=1e-5) == tuned.method.exact_at_start
    nudge(tuned)
    expected = model(**batch).logits
    dw.save(model, tmp_path / "adapter")
    twin, _ = FAMILIES["mixtral"]()
    dw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(**batch).logits, expected)
    dw.merge(model)
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
