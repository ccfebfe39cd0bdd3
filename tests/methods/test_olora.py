"""OLoRA starts from the QR decomposition of the weight."""

from __future__ import annotations

import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part


def test_the_output_does_not_change_at_the_start() -> None:
    model, x = net()
    base = model(x)
    attach(model, dw.OLoRA, rank=3)
    assert torch.allclose(model(x), base, atol=1e-14)


def test_b_is_orthonormal_and_a_is_upper_trapezoidal_with_a_positive_diagonal() -> None:
    model, _ = net(12, 8, 6)
    delta = part(attach(model, dw.OLoRA, rank=3))
    assert torch.allclose(delta.b.T @ delta.b, torch.eye(3, dtype=torch.float64))
    assert delta.a.tril(-1).abs().max() == 0
    assert (delta.a.diagonal() > 0).all()


def test_they_are_the_first_parts_of_the_whole_decomposition() -> None:
    model, _ = net(12, 8, 6)
    weight = model.first.weight.detach()
    delta = part(attach(model, dw.OLoRA, rank=3))
    q, r = torch.linalg.qr(weight)
    assert torch.allclose(delta.b @ delta.a, q[:, :3] @ r[:3])
    projector = delta.b @ delta.b.T
    assert torch.allclose(projector @ weight[:, :3], weight[:, :3])


def test_nothing_holds_b_orthonormal_later_and_the_change_has_twice_the_rank() -> None:
    model, _ = net(12, 8, 6)
    tuned = attach(model, dw.OLoRA, rank=3)
    nudge(tuned)
    delta = part(tuned)
    assert not torch.allclose(delta.b.T @ delta.b, torch.eye(3, dtype=torch.float64), atol=1e-2)
    assert torch.linalg.matrix_rank(delta.dense()) == 6


def test_a_rank_above_the_weight_is_the_whole_weight() -> None:
    model, _ = net(12, 8, 6)
    delta = part(attach(model, dw.OLoRA, rank=32))
    assert torch.allclose(delta.b @ delta.a, model.first.weight)
