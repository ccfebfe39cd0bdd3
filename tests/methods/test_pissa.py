"""PiSSA starts in the weight's principal directions and leaves the base alone."""

from __future__ import annotations

import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part


def start(**settings):
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.PiSSA, rank=3, **settings)
    return model, x, base, tuned


def test_the_output_does_not_change_at_the_start() -> None:
    model, x, base, _ = start()
    assert torch.allclose(model(x), base, atol=1e-12)


def test_the_product_is_the_best_approximation_of_the_weight() -> None:
    for settings in ({"niter": None}, {"niter": 16}, {"niter": None, "alpha": 12.0}):
        model, _, _, tuned = start(**settings)
        delta, weight = part(tuned), model.first.weight
        error = (weight - delta.scale * delta.b @ delta.a).norm()
        tail = torch.linalg.svdvals(weight)[3:].norm()
        assert abs(error / tail - 1) < 1e-4


def test_the_factors_share_every_singular_value_evenly() -> None:
    _, _, _, tuned = start(niter=None)
    delta = part(tuned)
    assert torch.allclose(delta.a.norm(dim=1), delta.b.norm(dim=0))


def test_both_factors_have_a_gradient_at_the_first_step() -> None:
    model, x, _, tuned = start()
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in tuned.parameters())


def test_it_is_an_ordinary_lora_of_twice_the_rank_on_the_untouched_base() -> None:
    _, _, _, tuned = start()
    nudge(tuned)
    delta = part(tuned)
    a, b = torch.cat([delta.a, delta.a0]), torch.cat([delta.b, -delta.b0], dim=1)
    assert torch.allclose(delta.dense(), delta.scale * b @ a)
    assert torch.linalg.matrix_rank(delta.dense()) == 6


def test_the_start_is_stored_and_never_trained() -> None:
    _, _, _, tuned = start()
    names = {name.rsplit(".", 1)[-1] for name in tuned.tensors()}
    assert names == {"a", "b", "a0", "b0"}
    assert {name.rsplit(".", 1)[-1] for name, _ in tuned.named_parameters()} == {"a", "b"}
