"""SODA: a shifted spectrum behind a rotation that stays one."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.singular import decomposed
from deltaworks.methods.structured.soda import rotations, sides
from deltaworks.model.weights import Weight
from tests.methods.toys import attach, net, nudge, part, steps


def test_the_weight_is_the_formula_also_away_from_rotations() -> None:
    model, x = net(12, 8, 6)
    weight, bias, base = model.first.weight.detach().clone(), model.first.bias, model(x)
    tuned = attach(model, dw.SODA)
    assert torch.equal(model(x), base)
    nudge(tuned, 0.3)
    delta, (u, s, vh) = part(tuned), decomposed(weight)
    o = torch.kron(torch.kron(delta.q1, delta.q2), delta.q3)
    expected = u @ torch.diag(torch.relu(s + delta.shift)) @ vh @ o.T
    assert torch.allclose(model.first(x), x @ expected.T + bias)
    assert torch.allclose(delta.fold(weight), expected)
    assert torch.autograd.gradcheck(lambda *_: model(x), (x.requires_grad_(), *tuned.parameters()))


def test_rotations_stay_rotations_under_the_rule_and_not_without() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.SODA)
    weight = model.first.weight.detach().clone()
    eye = [torch.eye(len(q)).double() for _, q in rotations(tuned)]

    def distance() -> float:
        return max(float((q.T @ q - one).norm().detach()) for (_, q), one in zip(rotations(tuned), eye, strict=True))

    first = model(x).detach()
    for _ in steps(model, x, tuned, 5):
        assert distance() < 1e-10
    assert not torch.allclose(model(x), first)
    assert not any(torch.allclose(q, one) for (_, q), one in zip(rotations(tuned), eye, strict=True))
    with torch.no_grad():
        part(tuned).shift.zero_()
    assert torch.allclose(torch.linalg.svdvals(part(tuned).fold(weight)), torch.linalg.svdvals(weight))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.05)
    model(x).square().sum().backward()
    optimizer.step()
    assert distance() > 1e-4


def test_the_first_step_is_a_turn_by_the_learning_rate() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.SODA)
    model(x).square().sum().backward()
    q = part(tuned).q3
    skew = q.grad.T - q.grad  # minus the gradient's skew part: the direction of descent, Q being the identity
    expected = torch.eye(len(q)).double() + 0.01 * skew / (skew.abs() + 1e-5)
    u, _, vh = torch.linalg.svd(expected)
    tuned.run(5, optimizer=torch.optim.AdamW(tuned.parameter_groups(0.01))).emit("gradients")
    assert torch.allclose(q, u @ vh) and q.grad is None


def test_a_value_below_zero_is_told_and_the_count_is_the_formula() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.SODA)
    assert sides(768) == (6, 8, 16) and sides(12) == (2, 2, 3) and sides(7) == (1, 1, 7)
    assert sum(p.numel() for p in part(tuned).parameters()) == 8 + 4 + 4 + 9
    with torch.no_grad():
        part(tuned).shift.fill_(-100.0)
    with pytest.warns(UserWarning, match="moved below zero"):
        tuned.run(5).emit("step_end")
    with pytest.raises(ValueError, match="soda takes its learning rate from the optimizer"):
        tuned.run(5).emit("gradients")
    assert model(x).isfinite().all()


@pytest.mark.parametrize("sizes", [(12, 8, 6), (8, 12, 18)])
def test_the_other_form_changes_the_triangular_factor_and_turns_it(sizes: tuple[int, int, int], tmp_path) -> None:
    model, x = net(*sizes)
    weight, bias, base = model.first.weight.detach().clone(), model.first.bias, model(x)
    tuned = attach(model, dw.SODA, form="qr", rank=2)
    assert torch.equal(model(x), base)
    delta, n = part(tuned), min(sizes[:2])
    q1, q2, q3 = sides(sizes[0])
    assert sum(p.numel() for p in delta.parameters()) == 2 * (n + sizes[1]) + q1**2 + q2**2 + q3**2
    list(steps(model, x, tuned, 3))
    assert max(float((q.T @ q - torch.eye(len(q))).norm().detach()) for _, q in rotations(tuned)) < 1e-10
    nudge(tuned, 0.3)
    rows = delta.vectors()[0]
    factor = weight @ rows.T
    assert torch.allclose(rows @ rows.T, torch.eye(n).double()) and torch.allclose(factor @ rows, weight)
    assert torch.allclose(factor.triu(1), torch.zeros_like(factor), atol=1e-12)
    o = torch.kron(torch.kron(delta.q1, delta.q2), delta.q3)
    expected = (factor + delta.b @ delta.a) @ rows @ o.T
    assert torch.allclose(model.first(x), x @ expected.T + bias) and torch.allclose(delta.fold(weight), expected)
    assert torch.autograd.gradcheck(lambda *_: model(x), (x.requires_grad_(), *tuned.parameters()))
    dw.save(model, tmp_path / "adapter")
    fresh, _ = net(*sizes)
    dw.load(fresh, tmp_path / "adapter")
    assert torch.allclose(fresh(x), model(x))
    other, _ = net(*sizes, seed=1)
    remade = type(delta).remade(delta.configuration(), delta.tensors(), {})
    with pytest.raises(ValueError, match="are not those the adapter was trained in"):
        remade.settle(Weight(other.first))


def test_a_rank_is_for_the_other_form() -> None:
    with pytest.raises(ValueError, match="rank=4 is for form='qr'"):
        dw.SODA(rank=4)
