"""VeRA: vectors around one shared random pair."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.scaled import RandomPair
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps


def test_all_layers_borrow_one_pair_that_training_leaves_alone() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.VeRA, rank=4)
    pairs = [delta.pair for delta in tuned.parts()]
    assert pairs[0] is pairs[1]
    before = pairs[0].a.clone(), pairs[0].b.clone()
    list(steps(model, x, tuned, 3, decay=0.1))
    assert torch.equal(pairs[0].a, before[0]) and torch.equal(pairs[0].b, before[1])
    twin = copy.deepcopy(model)
    assert twin.first.deltaworks.default.weight.pair is twin.second.deltaworks.default.weight.pair


def test_the_pair_depends_on_its_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = RandomPair(4, 12, 8, seed=5)
    torch.manual_seed(2)
    torch.randn(10)
    again, other = RandomPair(4, 12, 8, seed=5), RandomPair(4, 12, 8, seed=6)
    assert torch.equal(first.a, again.a) and torch.equal(first.b, again.b)
    assert not torch.equal(first.a, other.a)
    assert first.a.abs().max() <= (6 / 12) ** 0.5 and first.b.abs().max() <= (6 / 4) ** 0.5


def test_the_change_is_the_formula_on_slices_of_the_pair() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.VeRA, rank=4, seed=0)
    nudge(tuned)
    delta = part(tuned, "second")
    a, b = delta.pair.a[:, :8].double(), delta.pair.b[:6].double()
    expected = torch.diag(delta.lambda_b) @ b @ torch.diag(delta.lambda_d) @ a
    assert torch.allclose(delta.dense(), expected)
    assert torch.allclose(model.second(x[..., :8]), x[..., :8] @ (model.second.weight + expected).T + model.second.bias)


def test_lambda_d_has_no_gradient_at_the_first_step() -> None:
    model, x = net()
    tuned = attach(model, dw.VeRA, rank=4)
    model(x).square().sum().backward()
    for name, p in tuned.named_parameters():
        assert (p.grad.abs().max() == 0) == name.endswith("lambda_d")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_derivatives(dropout: float) -> None:
    model, x = net(5, 4, 3)
    tuned = attach(model, dw.VeRA, rank=3, dropout=dropout)
    nudge(tuned, 0.3)
    model.train()
    x.requires_grad_()

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model(inputs[0])

    assert torch.autograd.gradcheck(call, (x, *tuned.parameters()))


def test_training_keeps_the_narrow_product_only() -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.VeRA, rank=4)
    assert saved_shapes(lambda: model.first(x)) == [(10, 4)]


def test_files_hold_vectors_and_the_seed_brings_the_pair_back(tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.VeRA, rank=4)
    nudge(tuned)
    assert sum(t.numel() for t in tuned.tensors().values()) == (4 + 8) + (4 + 6)
    dw.save(model, tmp_path / "adapter")
    twin, _ = net(12, 8, 6)
    dw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(x), model(x))


def test_stacked_experts_borrow_the_same_pair() -> None:
    model, _ = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.VeRA(rank=4), seed=0)
    assert len({id(delta.pair) for delta in tuned.parts()}) == 1
    assert not any("pair" in name for name in tuned.tensors())
    assert all(name.rsplit(".", 1)[-1] in ("lambda_d", "lambda_b") for name in tuned.tensors())


def test_a_layer_wider_than_the_pair_is_refused_in_one_line() -> None:
    from deltaworks.core.operators.scaled import ScaledRandom

    with pytest.raises(ValueError, match=r"does not fit the shared random pair of \(4, 12, 8\)"):
        ScaledRandom(torch.zeros(4), torch.zeros(9), RandomPair(4, 12, 8, seed=0), fan_in=12)


def test_one_layer_may_have_a_smaller_rank() -> None:
    model, x = net()
    tuned = dw.attach(model, dw.VeRA(on=nn.Linear, rank=4, overrides={"second": {"rank": 2}}), seed=0)
    nudge(tuned)
    assert part(tuned, "second").lambda_d.shape == (2,) and model(x).isfinite().all()
