"""DCFT: a rank-one map, deconvolved."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part


@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_change_is_a_transposed_convolution_and_a_kronecker_product(d: int) -> None:
    model, x = net(16, 8, 6)
    weight, bias = model.first.weight.detach().clone(), model.first.bias
    tuned = attach(model, dw.DCFT, kernel=d, alpha=0.5)
    nudge(tuned, 0.5)
    delta = part(tuned)
    m = delta.a.T @ delta.b.T
    blown = torch.nn.functional.conv_transpose2d(m[None, None], delta.k[None, None], stride=d)[0, 0]
    assert torch.allclose(blown, torch.kron(m, delta.k))
    assert torch.allclose(delta.dense(), delta.scale * blown.T)
    assert torch.allclose(model.first(x), x @ (weight + delta.dense()).T + bias)
    assert torch.linalg.matrix_rank(delta.dense()) == d
    assert sum(p.numel() for p in delta.parameters()) == 24 // d + d * d
    assert torch.autograd.gradcheck(lambda *_: model(x), (x.requires_grad_(), *tuned.parameters()))


def test_one_by_one_it_is_a_rank_one_lora() -> None:
    model, _ = net(16, 8, 6)
    delta = part(attach(model, dw.DCFT, kernel=1))
    with torch.no_grad():
        delta.k.fill_(1.0)
    assert torch.allclose(delta.dense(), delta.scale * delta.b @ delta.a)


def test_a_zero_kernel_starts_at_the_base_and_the_usual_one_close_to_it() -> None:
    for zero in (True, False):
        model, x = net(16, 8, 6)
        base = model(x)
        attach(model, dw.DCFT, zero_kernel=zero)
        assert torch.equal(model(x), base) == zero and torch.allclose(model(x), base, atol=1e-2)


def test_the_penalty_holds_both_vectors_at_length_one() -> None:
    model, _ = net(16, 8, 6)
    tuned = attach(model, dw.DCFT, gamma=0.3)
    run = tuned.run(1).run
    distances = [(v.square().sum() - 1).abs() for delta in tuned.parts() for v in (delta.a, delta.b)]
    assert torch.allclose(tuned.rules[0].penalty(run), 0.3 * torch.stack(distances).mean())
    assert dw.DCFT(gamma=0.0).rules() == []
