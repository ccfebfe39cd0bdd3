"""Bone's two forms: blocks guided by the weight (BAT), and one pattern tiled along the input (MiSS)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.blocks import BlockAffine, Tiled
from tests.methods.toys import attach, net, nudge, part, saved_shapes


def affine(groups: int, r: int, along: str) -> BlockAffine:
    d = torch.randn(groups, r, r, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return BlockAffine(0.2 * d, along)


@pytest.mark.parametrize("along", ["in", "out"])
def test_every_block_is_mapped_by_its_groups_matrix(along: str) -> None:
    weight = torch.randn(6, 9, dtype=torch.float64)
    delta = affine(2 if along == "in" else 3, 3, along)
    new = delta.fold(weight)
    for i in range(2):
        for j in range(3):
            block, d = weight[3 * i : 3 * i + 3, 3 * j : 3 * j + 3], delta.d[i if along == "in" else j]
            assert torch.allclose(new[3 * i : 3 * i + 3, 3 * j : 3 * j + 3], block + block @ d + d)
            back = (block + block @ d) @ torch.linalg.inv(torch.eye(3, dtype=torch.float64) + d)
            assert torch.allclose(back, block)


def test_the_weight_guides_its_change() -> None:
    weight = torch.randn(6, 6, dtype=torch.float64)
    delta = affine(2, 3, "in")
    change = delta.fold(weight) - weight
    guided = torch.cat([weight[3 * i : 3 * i + 3].view(3, 2, 3) @ delta.d[i] for i in range(2)]).reshape(6, 6)
    assert torch.allclose(delta.fold(2 * weight) - 2 * weight - change, guided)
    assert torch.linalg.matrix_rank(change) > 3


def test_a_multiple_of_the_identity_adds_the_weight_and_the_identity() -> None:
    weight = torch.randn(6, 9, dtype=torch.float64)
    delta = BlockAffine(0.5 * torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    assert torch.allclose(delta.fold(weight) - weight, 0.5 * (weight + torch.eye(3).repeat(2, 3)))


def test_bone_starts_unchanged_and_counts_by_direction() -> None:
    for along, size in (("in", 2 * 8 + 2 * 6), ("out", 2 * 12 + 2 * 8)):
        model, x = net(12, 8, 6)
        base = model(x)
        tuned = attach(model, dw.BoneBAT, rank=2, along=along)
        assert torch.allclose(model(x), base, atol=1e-14)
        assert sum(p.numel() for p in tuned.parameters()) == size


def test_bone_keeps_the_input_and_no_weight() -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.BoneBAT, rank=2)
    x.requires_grad_()
    assert saved_shapes(lambda: model.first(x)) == [(2, 5, 12)]


def test_a_block_that_does_not_divide_is_refused_and_the_default_always_fits() -> None:
    model, _ = net(12, 8, 7)
    with pytest.raises(ValueError, match=r"rank=3 does not divide first \(8 x 12\); take a divisor of 4, or none"):
        attach(model, dw.BoneBAT, rank=3)
    tuned = attach(model, dw.BoneBAT)
    assert [delta.d.shape for delta in tuned.parts()] == [(2, 4, 4), (7, 1, 1)]


@pytest.mark.parametrize(("fan_out", "fan_in", "r", "m"), [(6, 9, 4, 6), (6, 8, 4, 3), (5, 3, 3, 1)])
def test_miss_repeats_its_pattern_and_is_lora_with_tiled_identities(fan_out: int, fan_in: int, r: int, m: int) -> None:
    d = torch.randn(r, m, dtype=torch.float64)
    delta = Tiled(d.clone(), fan_out, fan_in)
    identities = torch.eye(r, dtype=torch.float64).repeat(1, -(-fan_in // r))[:, :fan_in]
    assert torch.allclose(delta.dense(), d.repeat(1, fan_out // m).T @ identities)
    assert torch.linalg.matrix_rank(delta.dense()) <= r
    x = torch.randn(2, 3, fan_in, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(delta.side(x), x @ delta.dense().T)
    assert torch.autograd.gradcheck(lambda x, d: delta.side(x), (x, delta.d))


@pytest.mark.parametrize("settings", [{}, {"mini": 2}, {"dropout": 0.5}, {"rank": 4}])
def test_miss_beside_the_base_is_miss_in_the_weight(settings: dict) -> None:
    model, x = net(13, 8, 6)
    tuned = attach(model, dw.MiSS, **({"rank": 5} | settings))
    nudge(tuned)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), _dense(model, tuned, x))
    model.train()

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model(inputs[0])

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *tuned.parameters()))


def _dense(model: nn.Module, tuned: dw.Tuned, x: torch.Tensor) -> torch.Tensor:
    first, second = (delta.dense() for delta in tuned.parts())
    with dw.disable(model):
        hidden = torch.tanh(model.first(x) + x @ first.T)
        return model.second(hidden) + hidden @ second.T


def test_miss_starts_unchanged_with_a_gradient_everywhere() -> None:
    model, x = net()
    base = model(x)
    tuned = attach(model, dw.MiSS, rank=5)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    assert all((p.grad != 0).all() for p in tuned.parameters())


def test_miss_keeps_nothing_as_wide_as_the_input() -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.MiSS, rank=4)
    x.requires_grad_()
    kept = {shape[-1] for shape in saved_shapes(lambda: model.first(x)) if torch.Size(shape).numel() > 32}
    assert kept == {4}


def test_mini_stores_a_narrow_pattern() -> None:
    model, _ = net(12, 8, 6)
    tuned = dw.attach(model, dw.MiSS(on=nn.Linear, rank=4, mini=2), seed=0)
    nudge(tuned)
    assert part(tuned).d.shape == (4, 2)
    assert torch.allclose(part(tuned).dense()[:2], part(tuned).dense()[2:4])
    with pytest.raises(ValueError, match="mini=5 does not divide the 8 outputs of first"):
        attach(net(12, 8, 6)[0], dw.MiSS, mini=5)
