"""LoHa, LoKr, DiffuseKronA, OFT and BOFT compute what LyCORIS computes, once its single-precision casts are double."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.operators.rotation import BlockRotation, Butterfly
from deltaworks.core.part import Part
from tests.parity.twins import close

pytest.importorskip("lycoris")
from lycoris.functional import boft, diag_oft
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def linear() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8)), torch.randn(5, 12)


def convolution() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1)), torch.randn(2, 6, 5, 5)


def adapted(make: Callable[[], tuple[nn.Module, Tensor]], method: Any) -> tuple[nn.Module, Tensor, Part]:
    """A layer with an adapter that is off its start."""
    model, x = make()
    tuned = dw.attach(model, method, seed=0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, x.requires_grad_(), next(tuned.parts())


def assert_equal(ours: nn.Module, x: Tensor, theirs: nn.Module, pairs: dict[nn.Parameter, nn.Parameter]) -> None:
    """Outputs, the input's gradient, and those of parameters that are equal to begin with."""
    with torch.no_grad():
        for mine, other in pairs.items():
            other.copy_(mine.view_as(other))
    twin = x.detach().clone().requires_grad_()
    outputs = ours(x), theirs(twin)
    close(*outputs, 1e-10)
    g = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(g)
    close(x.grad, twin.grad, 1e-10)
    for mine, other in pairs.items():
        close(mine.grad, None if other.grad is None else other.grad.view_as(mine), 1e-10)


@pytest.mark.parametrize("make", [linear, convolution])
def test_loha(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, x, part = adapted(make, dw.LoHa(on="^0$", rank=2, alpha=6.0, init="lycoris"))
    theirs = LohaModule("one", make()[0][0], lora_dim=2, alpha=6)
    names = {"a1": "hada_w1_a", "b1": "hada_w1_b", "a2": "hada_w2_a", "b2": "hada_w2_b"}
    pairs = {part.get_parameter(own): theirs.get_parameter(other) for own, other in names.items()}
    assert_equal(model, x, theirs, pairs)


@pytest.mark.parametrize("make", [linear, convolution])
@pytest.mark.parametrize("rank", [1, 2, 9])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("tucker", [False, True])
def test_lokr(make: Callable[[], tuple[nn.Module, Tensor]], rank: int, both: bool, tucker: bool) -> None:
    method = dw.LoKr(on="^0$", rank=rank, alpha=6.0, both=both, init="lycoris", tucker=tucker)
    model, x, part = adapted(make, method)
    theirs = LokrModule("one", make()[0][0], lora_dim=rank, alpha=6, decompose_both=both, use_tucker=tucker)
    pairs = {value: theirs.get_parameter(f"lokr_{name}") for name, value in part.named_parameters()}
    assert len(pairs) == len(list(theirs.parameters()))
    assert_equal(model, x, theirs, pairs)


def test_diffusekrona_is_lokr_of_full_factors() -> None:
    model, x, part = adapted(linear, dw.DiffuseKronA(on=nn.Linear, rows=2, columns=2))
    theirs = LokrModule("one", linear()[0][0], full_matrix=True, factor=2)
    pairs = {value: theirs.get_parameter(f"lokr_{name}") for name, value in part.named_parameters()}
    assert_equal(model, x, theirs, pairs)


def turned(part: Any, weight: Tensor) -> Tensor:
    """What a rotation of the input makes of the transposed weight: they turn what a layer puts out."""
    return part.turned(weight.T, back=True).T


def test_oft_turns_inputs_as_theirs_turns_outputs() -> None:
    _, _, part = adapted(linear, dw.OFT(on=nn.Linear, block=4, terms=None))
    assert isinstance(part, BlockRotation)
    weight = torch.randn(12, 7)
    upper = torch.triu_indices(4, 4, 1)
    blocks = torch.zeros(3, 4, 4).index_put((torch.arange(3)[:, None], *upper), -part.k.detach()).requires_grad_()
    ours, theirs = turned(part, weight), weight + diag_oft.diff_weight(weight, blocks, None)
    close(ours, theirs, 1e-10)
    g = torch.randn_like(ours)
    ours.backward(g)
    theirs.backward(g)
    close(part.k.grad, -blocks.grad[:, upper[0], upper[1]], 1e-10)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_boft_turns_inputs_as_theirs_turns_outputs(stages: int) -> None:
    """Their stages interleave the two halves of a block; ours stand one after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    tuned = dw.attach(model, dw.BOFT(on=nn.Linear, block=4, stages=stages))
    (part,) = tuned.parts()
    assert isinstance(part, Butterfly)
    weight = torch.randn(16, 7)
    order = torch.arange(4).view(2, 2).T.flatten()
    blocks = torch.randn(stages, 4, 4, 4, requires_grad=True)
    back = order.argsort()
    with torch.no_grad():
        # Only the skew part turns: half of ours, transposed, is all of theirs.
        part.p.copy_(-2 * blocks[..., back, :][..., back])
    ours, theirs = turned(part, weight), weight + boft.diff_weight(weight, blocks, None)
    close(ours, theirs, 1e-10)
    g = torch.randn_like(ours)
    ours.backward(g)
    theirs.backward(g)
    close(part.p.grad[..., order, :][..., order] * -2, blocks.grad, 1e-10)
