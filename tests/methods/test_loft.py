"""LoFT steps the factors as AdamW would step the weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from tests.families import FAMILIES
from tests.methods.toys import attach, net, part

SHARP = {"damp_a": 0.0, "damp_b": 0.0, "clip": 0}


def square(**settings):
    """A 5 x 5 linear layer with a full-rank LoFT adapter at an invertible start, its optimizer and rules."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 5, bias=False).double()
    model = nn.Sequential(layer)
    tuned = dw.attach(model, dw.LoFT(on=nn.Linear, rank=5, **(SHARP | settings)), seed=0)
    delta = next(tuned.parts())
    with torch.no_grad():
        delta.a.copy_(torch.randn(5, 5).double() + 2 * torch.eye(5))
        delta.b.copy_(torch.randn(5, 5).double() + 2 * torch.eye(5))
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01), weight_decay=0.0)
    rules = tuned.run(40, optimizer=optimizer)
    rules.emit("attached")
    return model, tuned, delta, optimizer, rules


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)])
def test_at_full_rank_it_is_adamw_on_the_weight(betas: tuple[float, float]) -> None:
    model, _, delta, optimizer, rules = square(beta1=betas[0], beta2=betas[1], eps=1e-4)
    weight = nn.Parameter((model[0].weight + delta.dense()).detach())
    full = torch.optim.AdamW([weight], lr=0.01, betas=betas, eps=1e-4, weight_decay=0.0)
    x, target = torch.randn(30, 5).double(), torch.randn(30, 5).double()
    for _ in range(40):
        (model(x) - target).square().mean().backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        full.zero_grad()
        (x @ weight.T - target).square().mean().backward()
        full.step()
        assert torch.allclose(model[0].weight + delta.dense(), weight, atol=1e-8)


def test_an_invertible_change_of_the_factors_changes_no_step() -> None:
    trajectories = []
    for twist in (False, True):
        model, x = net(12, 8, 6)
        tuned = attach(model, dw.LoFT, rank=3, **SHARP)
        change = torch.tensor([[2.0, 1, 0], [0, 1, -1], [1, 0, 1]]).double()
        with torch.no_grad():
            for delta in tuned.parts():
                delta.b.copy_(torch.randn(delta.b.shape, generator=torch.Generator().manual_seed(3)).double())
                if twist:
                    delta.a.copy_(change @ delta.a)
                    delta.b.copy_(delta.b @ torch.linalg.inv(change))
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05)
        rules = tuned.run(6, optimizer=optimizer)
        for _ in range(6):
            model(x).square().mean().backward()
            rules.emit("gradients")
        trajectories.append([delta.dense().detach() for delta in tuned.parts()])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*trajectories, strict=True))


def test_b_moves_first_and_they_take_turns_while_the_optimizer_keeps_nothing() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.LoFT, rank=3)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01, weight_decay=0.1))
    rules = tuned.run(4, optimizer=optimizer)
    for call in range(4):
        a, b = part(tuned).a.clone(), part(tuned).b.clone()
        (model(x) - 1).square().mean().backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        assert torch.equal(part(tuned).a, a) == (call % 2 == 0)
        assert torch.equal(part(tuned).b, b) == (call % 2 == 1)
    assert not optimizer.state
    state = sum(t.numel() for kept in rules.rules[0].moments.values() for key, t in kept.items() if key != "partner")
    assert state == 3 * (3 + 1) * (12 + 8 + 8 + 6)


def test_the_step_is_clipped_by_the_projected_full_gradient() -> None:
    """The norm is that of the full gradient projected on A's rows, over all layers."""
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.LoFT, rank=3, clip=0.5)
    twin, _ = net(12, 8, 6)
    twin(x).square().sum().backward()
    total = 0.0
    for delta in tuned.parts():
        full = twin.get_submodule(delta.site.path).weight.grad
        total += (full @ torch.linalg.pinv(delta.a) @ delta.a).square().sum()
    model(x).square().sum().backward()
    rule = tuned.run(1).rules[0]
    sides = [rule.sides(delta.a, delta.b)["b"] for delta in tuned.parts()]
    assert rule.clipping(sides) == pytest.approx(0.5 / float(total.detach().sqrt()), rel=1e-4)


def test_everything_else_is_stepped_by_the_optimizer_and_experts_too() -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.LoFT(rank=2), also="norm.final", seed=0)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01))
    norm = model.model.norm.weight
    before = [p.detach().clone() for p in tuned.parameters()]
    rules = tuned.run(2, optimizer=optimizer)
    model(**batch).loss.backward()
    rules.emit("gradients")
    assert norm.grad is not None
    optimizer.step()
    assert list(optimizer.state) == [norm]
    moved = [name for (name, p), was in zip(tuned.named_parameters(), before, strict=True) if not torch.equal(p, was)]
    assert (
        all(name.endswith(".b") or name == "model.norm.weight" for name in moved) and len(moved) == len(before) // 2 + 1
    )


def test_what_is_not_low_rank_is_stepped_as_adamw_steps_it() -> None:
    model, x = net(12, 8, 6)
    tuned = dw.attach(model, dw.LoFT(on="first", rank=3), also="second", seed=0)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01, weight_decay=0.1))
    trained = [model.second.weight, model.second.bias]
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in trained]
    twin = torch.optim.AdamW(copies, lr=0.01, weight_decay=0.1)
    rules = tuned.run(4, optimizer=optimizer)
    rules.emit("attached")
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        for copy, parameter in zip(copies, trained, strict=True):
            copy.grad = parameter.grad.clone()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        twin.step()
        assert all(torch.equal(copy, parameter) for copy, parameter in zip(copies, trained, strict=True))


def test_without_an_optimizer_there_is_no_learning_rate() -> None:
    model, x = net()
    tuned = attach(model, dw.LoFT, rank=2)
    model(x).sum().backward()
    with pytest.raises(ValueError, match=r"run\(\.\.\., optimizer"):
        tuned.run(1).emit("gradients")
