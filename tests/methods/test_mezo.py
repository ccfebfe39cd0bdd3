"""Zeroth-order optimisation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.rule import Run
from deltaworks.core.zeroth_order import ZerothOrder
from tests.families import FAMILIES
from tests.methods.toys import net


class Quadratic(nn.Module):
    """L(w) = w^T A w / 2, whose gradient is A w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64))
        self.register_buffer("a", torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)))

    def forward(self) -> Tensor:
        return 0.5 * (self.w @ self.a @ self.w.T).sum()


def steps(model: nn.Module, batch: dict, tuned: dw.Tuned, number: int, lr: float) -> tuple[ZerothOrder, list[float]]:
    rules = tuned.run(number, seed=3)
    rules.emit("attached")
    rule = rules.owner
    assert isinstance(rule, ZerothOrder)
    losses = []
    for _ in range(number):
        rules.emit("step_begin")
        losses.append(float(rule.own_step(rules.run, lambda: model(**batch).loss, lr)))
        rules.emit("step_end")
    return rule, losses


def test_the_estimate_is_unbiased_on_a_quadratic() -> None:
    model = Quadratic()
    tuned = dw.attach(model, dw.MeZO(settings_of_over={"on": "everything"}))
    start, gradient = model.w.detach().clone(), (model.a @ model.w.detach().T).T
    rule, run = ZerothOrder(1e-3), Run(tuned)
    total, number = torch.zeros_like(start), 4000
    for _ in range(number):
        rule.own_step(run, model, 1.0)
        total += start - model.w.detach()
        model.w.data.copy_(start)
    assert torch.allclose(total / number, gradient, atol=0.35)


@pytest.mark.parametrize("over, settings", [("full", {}), ("lora", {"rank": 2})])
def test_replaying_the_log_gives_the_same_weights(over: str, settings: dict) -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.MeZO(over=over, settings_of_over=settings, weight_decay=0.1), seed=0)
    twin = copy.deepcopy(model)
    rule, _ = steps(model, batch, tuned, 5, 1e-4)
    again = dw.tuned(twin)
    ZerothOrder(rule.eps, weight_decay=0.1).replay(again, rule.log)
    for (name, ours), (_, theirs) in zip(tuned.tensors().items(), again.tensors().items(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_loss_falls_and_what_is_frozen_stays() -> None:
    model, batch = FAMILIES["llama"]()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = dw.attach(model, dw.MeZO(over="lora", settings_of_over={"rank": 4}), seed=0)
    _, losses = steps(model, batch, tuned, 150, 3e-3)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_both_passes_see_one_batch_without_dropout_and_modes_return() -> None:
    model, batch = FAMILIES["llama"]()
    model.train()
    model.lm_head.eval()
    tuned = dw.attach(model, dw.MeZO(over="lora", settings_of_over={"rank": 2, "dropout": 0.9}), seed=0)
    rule, run = ZerothOrder(1e-3), Run(tuned)
    modes = []

    def loss() -> Tensor:
        modes.append(any(module.training for module in model.modules()))
        assert not torch.is_grad_enabled()
        return model(**batch).loss

    rule.own_step(run, loss, 0.0)
    assert modes == [False, False]
    assert model.training and not model.lm_head.training


def test_no_step_at_learning_rate_zero() -> None:
    model, batch = FAMILIES["llama"]()
    model.double()
    tuned = dw.attach(model, dw.MeZO())
    start = {name: value.clone() for name, value in tuned.tensors().items()}
    steps(model, batch, tuned, 2, 0.0)
    assert all(torch.allclose(value, start[name], atol=1e-14) for name, value in tuned.tensors().items())


def test_what_cannot_be_perturbed_is_refused_when_it_is_named() -> None:
    with pytest.raises(ValueError, match="no method 'lorra'"):
        dw.MeZO(over="lorra")
    with pytest.raises(ValueError, match="no hyper-parameter 'rnk'"):
        dw.MeZO(over="lora", settings_of_over={"rnk": 4})
    with pytest.raises(ValueError, match="name of another method"):
        dw.MeZO(over="mezo")


def test_the_perturbation_is_the_papers_for_what_it_moves() -> None:
    assert [dw.MeZO(over=over).rules()[-1].eps for over in ("full", "lora")] == [1e-3, 1e-2]
    assert dw.MeZO(over="full", eps=0.5).rules()[-1].eps == 0.5


def test_a_first_group_with_a_factor_does_not_scale_the_runs_rate() -> None:
    over = {"over": "dora", "on": nn.Linear, "overrides": {"second": {"b_lr_ratio": 2.0}}}
    model, _ = net()
    tuned = dw.attach(model, dw.MeZO(over="lora_plus", settings_of_over=over), seed=0)
    groups = tuned.parameter_groups(1e-3)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["first.weight.b"] == pytest.approx(16e-3) and rates["second.weight.b"] == pytest.approx(2e-3)
    run = tuned.run(1, optimizer=torch.optim.SGD(groups)).run
    assert groups[0]["lr"] != 1e-3 and run.rate == pytest.approx(1e-3)
