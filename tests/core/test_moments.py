"""A parameter changes its size and its optimizer's state goes along."""

from __future__ import annotations

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

import deltaworks as dw
from deltaworks.core import moments
from tests.methods.toys import attach, net

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}
every = pytest.mark.parametrize("kind", OPTIMIZERS)


def stepped(kind: str, *shape: int, wrapped: bool = False):
    """A parameter after two steps, and its optimizer."""
    parameter = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = OPTIMIZERS[kind]([parameter])
    for step in range(2):
        parameter.grad = (parameter.detach() + step).sin()
        optimizer.step()
    if wrapped:
        from accelerate import Accelerator

        Accelerator(cpu=True)
        optimizer = AcceleratedOptimizer(optimizer)
    return parameter, optimizer


@every
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_what_survives_keeps_its_state_and_what_is_new_has_none(kind: str, dim: int) -> None:
    parameter, optimizer = stepped(kind, 4, 5)
    value = parameter.detach().clone()
    before = {name: state.clone() for name, state in moments.moments(parameter, optimizer).items()}
    chosen = torch.tensor([3, 1])
    moments.keep(parameter, chosen, dim, optimizer)
    moments.grow(parameter, torch.full_like(value.index_select(dim, chosen[:1]), 7.0), dim, optimizer, at=1)
    expected = torch.cat(
        [value.select(dim, 3).unsqueeze(dim), torch.full_like(value.narrow(dim, 0, 1), 7.0),
         value.select(dim, 1).unsqueeze(dim)], dim
    )  # fmt: skip
    assert torch.equal(parameter, expected)
    assert before, "the optimizer remembers something"
    for name, state in moments.moments(parameter, optimizer).items():
        if before[name].shape[dim] == 1:
            assert torch.equal(state, before[name])
        else:
            assert torch.equal(state.select(dim, 0), before[name].select(dim, 3))
            assert torch.equal(state.select(dim, 2), before[name].select(dim, 1))
            assert not state.select(dim, 1).any()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("kind", sorted(set(OPTIMIZERS) - {"adafactor"}))  # whose rows share what they remember
def test_survivors_go_on_as_if_nothing_had_happened(kind: str) -> None:
    (one, first), (two, second) = stepped(kind, 4, 5), stepped(kind, 4, 5)
    moments.grow(two, torch.zeros(2, 5, dtype=torch.float64), 0, second)
    for step in range(3):
        one.grad = (one.detach() + step).cos()
        two.grad = (two.detach() + step).cos()
        first.step()
        second.step()
    assert torch.equal(one, two[:4])


def test_members_of_a_stack_keep_different_slices() -> None:
    parameter, optimizer = stepped("adamw", 2, 3, 4)
    value, state = parameter.detach().clone(), optimizer.state[parameter]["exp_avg"].clone()
    moments.keep(parameter, torch.tensor([[0, 2], [1, 2]]), -2, optimizer)
    for result, whole in ((parameter, value), (optimizer.state[parameter]["exp_avg"], state)):
        assert torch.equal(result, torch.stack([whole[0, [0, 2]], whole[1, [1, 2]]]))


def test_a_living_graph_does_not_hold_the_old_shape() -> None:
    parameter = nn.Parameter(torch.randn(2, 3))
    x = torch.randn(4, 3)
    loss = (x @ parameter.T).sum()
    loss.backward()
    moments.grow(parameter, torch.zeros(3, 3), 0)
    (x @ parameter.T).sum().backward()
    assert parameter.grad is not None and parameter.grad.shape == (5, 3) and loss.grad_fn is not None


def test_a_wrapped_optimizer_is_reached() -> None:
    parameter, optimizer = stepped("adamw", 4, 5, wrapped=True)
    moments.restart(parameter, optimizer, at=(slice(1, 2),))
    state = moments.moments(parameter, optimizer)
    assert set(state) == {"exp_avg", "exp_avg_sq"}
    assert all(not value[1].any() and value[0].all() for value in state.values())
    moments.restart(parameter, optimizer)
    assert not moments.moments(parameter, optimizer)
    assert isinstance(moments.unwrapped(optimizer), torch.optim.AdamW) and moments.unwrapped(None) is None


def test_state_that_cannot_follow_begins_anew_and_says_so() -> None:
    parameter, optimizer = stepped("adamw", 4, 5)
    optimizer.state[parameter]["packed"] = torch.zeros(10, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="AdamW keeps packed in a form that cannot follow"):
        moments.keep(parameter, torch.tensor([0]), 0, optimizer)
    assert parameter not in optimizer.state and parameter.shape == (1, 5)


def test_an_optimizer_takes_the_parameters_of_a_changed_adapter() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.LoRA, rank=2)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.1, weight_decay=0.2))
    model(x).square().mean().backward()
    optimizer.step()
    parts = dict(tuned.named_parts())
    (name, gone), (_, stays) = parts.items()
    new = type(gone)(torch.zeros(3, 12).double(), torch.zeros(8, 3).double())
    tuned.exchange(name, new)
    moments.regroup(tuned, optimizer)
    group = optimizer.param_groups[0]
    assert [id(p) for p in group["params"]] == [id(p) for p in tuned.parameters()]
    assert group["names"] == [name for name, _ in tuned.named_parameters()]
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.2)
    assert set(optimizer.state) == set(stays.parameters())
