"""LoRA-FA trains B and remembers only what is as narrow as the rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from tests.families import FAMILIES
from tests.methods.toys import attach, net, part, saved_shapes, steps


def test_a_is_the_same_bits_after_training_with_decay_and_the_change_stays_in_its_row_space() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.LoRAFA, rank=3)
    before = [delta.a.clone() for delta in tuned.parts()]
    list(steps(model, x, tuned, 5, decay=0.1))
    assert all(torch.equal(delta.a, a) for delta, a in zip(tuned.parts(), before, strict=True))
    delta = part(tuned)
    outside = torch.eye(12, dtype=torch.float64) - torch.linalg.pinv(delta.a) @ delta.a
    assert delta.dense().norm() > 1e-3
    assert (delta.dense() @ outside).abs().max() < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_activation_as_wide_as_the_input_is_kept(dropout: float) -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.LoRAFA, rank=3, dropout=dropout)
    model.train()
    assert saved_shapes(lambda: model.first(x)) == [(10, 3)]


def test_a_large_rank_does_not_bring_the_input_back() -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.LoRAFA, rank=8)
    model.train()
    assert saved_shapes(lambda: model.first(x.repeat(20, 1, 1))) == [(200, 8)]


def test_it_keeps_fewer_bytes_than_lora_over_a_whole_model() -> None:
    def kept(method: type) -> int:
        model, batch = FAMILIES["llama"]()
        dw.attach(model.train(), method(rank=2), seed=0)
        total, seen = 0, set()

        def pack(tensor):
            nonlocal total
            if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                total += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch)
        return total

    assert kept(dw.LoRAFA) < kept(dw.LoRA)


@pytest.mark.parametrize(("alpha", "size"), [(8.0, 1.0), (32.0, 0.3)])
def test_a_projected_descent_step_is_the_projected_full_gradient(alpha: float, size: float) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.LoRAFA, rank=3, alpha=alpha, project=True)
    delta = part(tuned)
    with torch.no_grad():
        delta.a.mul_(size)
    rules = tuned.run(1)
    rules.emit("attached")
    model.first.weight.requires_grad_()
    loss = model(x).square().sum()
    (full,) = torch.autograd.grad(loss, model.first.weight, retain_graph=True)
    model.first.weight.requires_grad_(False)
    loss.backward()
    rules.emit("gradients")
    with torch.no_grad():
        delta.b.sub_(delta.b.grad, alpha=0.01)
    projector = torch.linalg.pinv(delta.a) @ delta.a
    assert torch.allclose(delta.dense(), -0.01 * full @ projector, rtol=1e-5, atol=1e-8)


def test_projection_reaches_stacked_experts() -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.LoRAFA(rank=2, project=True), seed=0)
    model(**batch).loss.backward()
    plain = [p.grad.clone() for p in tuned.parameters()]
    rules = tuned.run(1)
    rules.emit("gradients")
    for parameter, before in zip(tuned.parameters(), plain, strict=True):
        assert parameter.grad.isfinite().all() and not torch.equal(parameter.grad, before)
