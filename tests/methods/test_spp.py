"""SPP: what is zero stays zero."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps


def pruned(pattern: str):
    model, x = net(12, 8, 6)
    with torch.no_grad():
        for layer in (model.first, model.second):
            size = layer.weight.shape
            if pattern == "2:4":
                scores = layer.weight.abs().view(-1, 4)
                keep = torch.zeros_like(scores).scatter(1, scores.topk(2, dim=1).indices, 1).view(size)
            else:
                keep = (torch.rand(size, generator=torch.Generator().manual_seed(2)) > 0.6).to(layer.weight)
            layer.weight.mul_(keep)
    return model, x


@pytest.mark.parametrize("pattern", ["2:4", "any"])
def test_zeros_stay_zeros_at_every_step_and_after_merging(pattern: str) -> None:
    model, x = pruned(pattern)
    zero = model.first.weight == 0
    tuned = attach(model, dw.SPP, rank=4, dropout=0.0)
    for _ in steps(model, x, tuned, 4):
        assert (part(tuned).fold(model.first.weight.detach())[zero] == 0).all()
    beside = model(x)
    dw.merge(model)
    assert (model.first.weight[zero] == 0).all() and torch.allclose(model(x), beside)
    assert (model.first.weight != 0).sum() == (~zero).sum()
    if pattern == "2:4":
        assert ((model.first.weight.view(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
def test_the_ratio_is_the_formula_also_for_uneven_groups(rank: int) -> None:
    model, x = net(12, 8, 6)
    weight, bias, base = model.first.weight.detach().clone(), model.first.bias, model(x)
    tuned = attach(model, dw.SPP, rank=rank, scale=3.0, dropout=0.0)
    assert torch.equal(model(x), base)
    nudge(tuned)
    delta = part(tuned)
    expected = weight.clone()
    for i in range(8):
        for j in range(12):
            expected[i, j] *= 1 + 3.0 * float((delta.a[i * rank // 8, j] * delta.b[i]).detach())
    assert torch.allclose(model.first(x), x @ expected.T + bias)
    assert torch.allclose(delta.fold(weight), expected)
    with torch.no_grad():
        assert torch.allclose(model.first(x), x @ expected.T + bias)


def test_the_gradient_is_the_derivative_and_only_the_input_is_kept() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.SPP, rank=3, dropout=0.0)
    nudge(tuned)
    x.requires_grad_()
    assert (2, 5, 12) in saved_shapes(lambda: model.first(x)) and (8, 12) not in saved_shapes(lambda: model.first(x))
    assert torch.autograd.gradcheck(lambda *_: model(x), (x, *tuned.parameters()))
