"""QR-LoRA: a trained trapezoid behind frozen principal columns."""

from __future__ import annotations

import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps


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
