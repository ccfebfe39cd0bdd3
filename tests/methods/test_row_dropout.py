"""LoHa and LoKr: rows of the change, or all of it, are dropped in training; LoHa's cores for convolutions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part

FORMS = {"loha": {"rank": 2}, "lokr": {"rank": 2, "init": "lycoris", "rescale": True}, "lokr full": {"rank": 8}}
every = pytest.mark.parametrize("form", FORMS)


def made(form: str, **settings):
    model, x = net(12, 8, 6)
    slug = form.partition(" ")[0]
    tuned = attach(model, dw.methods()[slug], **(FORMS[form] | settings))
    nudge(tuned, 0.5)
    return model.train(), x, tuned


@every
def test_whole_rows_of_the_change_are_dropped_and_what_is_left_is_scaled_or_not(form: str) -> None:
    model, x, tuned = made(form, row_dropout=0.5)
    base = x @ model.first.weight.T + model.first.bias
    whole = x @ part(tuned).dense().T
    torch.manual_seed(3)
    change = model.first(x) - base
    gone = (change.abs().amax((0, 1)) < 1e-12).nonzero().flatten().tolist()
    stays = [row for row in range(8) if row not in gone]
    assert gone and stays
    factor = len(stays) / 8 if form != "lokr full" else 1.0
    assert torch.allclose(change[..., stays] * factor, whole[..., stays])
    assert not torch.allclose(model.first(x) - base, change), "drawn anew in every call"
    model.eval()
    assert torch.allclose(model.first(x) - base, whole)


@every
def test_a_layers_change_is_dropped_as_a_whole(form: str) -> None:
    model, x, tuned = made(form, module_dropout=0.5)
    base, whole = x @ model.first.weight.T + model.first.bias, x @ part(tuned).dense().T
    torch.manual_seed(0)
    kinds = []
    for _ in range(40):
        change = model.first(x) - base
        kinds.append(bool(change.abs().max() < 1e-12))
        assert kinds[-1] or torch.allclose(change, whole)
    assert 8 < sum(kinds) < 32


@every
def test_gradients_are_those_of_the_rows_that_stayed(form: str) -> None:
    model, x, tuned = made(form, row_dropout=0.4, module_dropout=0.2)
    x.requires_grad_()

    def seeded(*_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return model(x)

    assert torch.autograd.gradcheck(seeded, (x, *tuned.parameters()))


def test_where_nothing_passes_beside_the_weight_dropout_says_that_it_cannot_act() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    for method in (dw.LoHa, dw.LoKr):
        with pytest.warns(UserWarning, match="row_dropout and module_dropout do not act at"):
            dw.detach(dw.attach(model, method(on=nn.Conv2d, row_dropout=0.5)).model)


def base_model(kind: type, inner: int, out: int) -> nn.Sequential:
    """A convolution with a kernel of three points an axis, then one with a single point; the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(kind(6, inner, 3, padding=1), kind(inner, out, 1)).double()


def assert_learnt_stored_and_merged(
    tuned: dw.Tuned, fresh: nn.Sequential, x: torch.Tensor, expected: torch.Tensor, tmp_path: Path
) -> None:
    """The first layer's change is as expected, has gradients, comes back from its file and merges."""
    model, weight = tuned.model, fresh[0].weight.detach().clone()
    assert torch.allclose(next(tuned.parts()).dense().view_as(weight), expected)
    beside = model(x)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(beside.square().sum(), tuned.parameters()))
    dw.save(model, tmp_path / "adapter")
    dw.load(fresh, tmp_path / "adapter")
    assert torch.allclose(fresh(x), beside)
    dw.merge(model)
    assert torch.allclose(model(x), beside) and torch.allclose(model[0].weight, weight + expected)


@pytest.mark.parametrize("init", ["peft", "lycoris"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_convolution_may_have_cores(kind: type, init: str, tmp_path) -> None:
    model = base_model(kind, 8, 5)
    x = torch.randn(2, 6, *[7] * (model[0].weight.dim() - 2), dtype=torch.float64)
    base = model(x)
    weight = model[0].weight.detach().clone()
    tuned = dw.attach(model, dw.LoHa(on=kind, rank=2, alpha=3.0, tucker=True, init=init), seed=0)
    assert torch.equal(model(x), base)
    cored, point = tuned.parts()
    points = weight[0, 0].numel()
    assert sum(p.numel() for p in cored.parameters()) == 2 * 2 * (6 + 8) + 2 * 4 * points
    assert sum(p.numel() for p in point.parameters()) == 2 * 2 * (8 + 5), "a kernel of one point needs no core"
    nudge(tuned, 0.3)
    core = (2, 2, *weight.shape[2:])
    products = [
        torch.einsum("ij...,io,jc->oc...", t.view(core), a, b)
        for t, a, b in ((cored.t1, cored.a1, cored.b1), (cored.t2, cored.a2, cored.b2))
    ]
    expected = 1.5 * products[0] * products[1]
    assert_learnt_stored_and_merged(tuned, base_model(kind, 8, 5), x, expected, tmp_path)


@pytest.mark.parametrize("init", ["peft", "lycoris"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_factor_of_a_convolution_may_have_a_core(kind: type, init: str, tmp_path) -> None:
    model = base_model(kind, 16, 9)
    x = torch.randn(2, 6, *[7] * (model[0].weight.dim() - 2), dtype=torch.float64)
    base, weight = model(x), model[0].weight.detach().clone()
    method = dw.LoKr(on=kind, rank=1, alpha=3.0, tucker=True, init=init)
    tuned = dw.attach(model, method, seed=0)
    assert torch.equal(model(x), base)
    cored, point = tuned.parts()
    points = weight[0, 0].numel()
    assert {name: tuple(value.shape) for name, value in cored.named_parameters()} == {
        "w1": (4, 2), "w2_a": (1, 4), "w2_b": (1, 3), "t2": (1, 1, points),
    }  # fmt: skip
    assert hasattr(point, "w2_a") and not hasattr(point, "t2"), "a kernel of one point needs no core"
    nudge(tuned, 0.3)
    second = torch.einsum("ij...,io,jc->oc...", cored.t2.view(1, 1, *weight.shape[2:]), cored.w2_a, cored.w2_b)
    expected = 3.0 * torch.kron(cored.w1.view(4, 2, *[1] * (second.dim() - 2)), second)
    assert_learnt_stored_and_merged(tuned, base_model(kind, 16, 9), x, expected, tmp_path)
