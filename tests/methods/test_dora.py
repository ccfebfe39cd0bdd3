"""DoRA: magnitude and direction."""

from __future__ import annotations

import torch

import deltaworks as dw
from deltaworks.core.operators.decomposed import Decomposed
from tests.methods.toys import attach, net, nudge, part, saved_shapes


def start(**settings):
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.DoRA, rank=3, alpha=6.0, **settings)
    nudge(tuned)
    return model, x, tuned


def effective(delta: Decomposed, weight: torch.Tensor) -> torch.Tensor:
    changed = weight + delta.scale * delta.b @ delta.a
    return (delta.magnitude / changed.norm(dim=1))[:, None] * changed


def test_the_magnitude_starts_as_the_norm_of_each_output_row() -> None:
    model, _ = net()
    tuned = attach(model, dw.DoRA)
    assert torch.allclose(part(tuned).magnitude, model.first.weight.norm(dim=1))


def test_rows_keep_their_magnitude_whatever_the_factors_do() -> None:
    model, _, tuned = start()
    delta = part(tuned)
    assert torch.allclose(delta.fold(model.first.weight).norm(dim=1), delta.magnitude.abs())


def test_the_product_with_activations_is_the_definition() -> None:
    model, x, tuned = start()
    with torch.no_grad():
        expected = x @ effective(part(tuned), model.first.weight).T + model.first.bias
        assert torch.allclose(model.first(x), expected)
        assert torch.allclose(part(tuned).fold(model.first.weight), effective(part(tuned), model.first.weight))


def test_factors_that_trade_a_number_change_nothing() -> None:
    model, x, tuned = start()
    expected = model(x)
    with torch.no_grad():
        for delta in tuned.parts():
            delta.a.mul_(4.0)
            delta.b.div_(4.0)
    assert torch.allclose(model(x), expected)


def test_gradients_are_those_of_the_folded_weight_with_a_constant_norm() -> None:
    model, x, tuned = start()
    delta, weight, bias = part(tuned), model.first.weight.detach(), model.first.bias.detach()
    x.requires_grad_()
    g = torch.randn(2, 5, 8, dtype=torch.float64)
    wanted = [x, delta.magnitude, delta.a, delta.b]
    ours = torch.autograd.grad(model.first(x), wanted, g)
    changed = weight + delta.scale * delta.b @ delta.a
    y = x @ ((delta.magnitude / changed.norm(dim=1).detach())[:, None] * changed).T + bias
    for a, b in zip(ours, torch.autograd.grad(y, wanted, g), strict=True):
        assert torch.allclose(a, b)
    through = torch.autograd.grad(x @ effective(delta, weight).T + bias, delta.b, g)[0]
    assert not torch.allclose(ours[3], through, rtol=1e-2)


def test_the_gradient_of_the_magnitude_is_that_of_a_gain() -> None:
    model, x, tuned = start()
    delta = part(tuned)
    y = model.first(x)
    g = torch.randn_like(y)
    (dm,) = torch.autograd.grad(y, delta.magnitude, g)
    gain = (y - model.first.bias) / delta.magnitude
    assert torch.allclose(dm, (g * gain).sum((0, 1)))


def test_the_norm_follows_every_step() -> None:
    model, _, tuned = start()
    delta, weight = part(tuned), model.first.weight.detach()
    for _ in range(2):
        nudge(tuned, 0.3)
        assert torch.allclose(delta.norms(weight), (weight + delta.scale * delta.b @ delta.a).norm(dim=1))


def test_dropout_leaves_the_base_alone() -> None:
    model, x = net()
    attach(model, dw.DoRA, rank=3, dropout=0.9)
    with dw.disable(model):
        base = model(x)
    model.train()
    assert torch.allclose(model(x), base)


def test_a_row_of_zeros_stays_zero() -> None:
    model, x = net()
    with torch.no_grad():
        model.first.weight[2] = 0
    tuned = attach(model, dw.DoRA, rank=2)
    model(x).sum().backward()
    assert model(x).isfinite().all()
    assert all(p.grad.isfinite().all() for p in tuned.parameters())


def test_training_keeps_input_narrow_product_and_direction() -> None:
    model, x, _ = start()
    x.requires_grad_()
    shapes = [shape for shape in saved_shapes(lambda: model.first(x)) if len(shape) > 1]
    assert sorted(shapes) == [(2, 5, 12), (10, 3), (10, 8)]
