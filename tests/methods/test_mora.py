"""MoRA: a square matrix between fixed operators."""

from __future__ import annotations

import math

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.square import Square
from tests.methods.toys import attach, net, part, saved_shapes


def square(r: int, kind: str, fan_out: int, fan_in: int) -> Square:
    m = torch.randn(r, r, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Square(m, kind, fan_out, fan_in)


@pytest.mark.parametrize(("fan_out", "fan_in", "r"), [(6, 9, 4), (9, 6, 4), (4, 5, 7), (8, 8, 4)])
def test_sharing_adds_entries_of_m_by_position(fan_out: int, fan_in: int, r: int) -> None:
    delta = square(r, "share", fan_out, fan_in)
    expected = torch.zeros(fan_out, fan_in, dtype=torch.float64)
    for padded in range(math.ceil(fan_in / r) * r):
        for i in range(fan_out):
            expected[i, padded % fan_in] += delta.m[i % r, padded % r].item()
    assert torch.allclose(delta.dense(), expected)


@pytest.mark.parametrize(("fan_out", "fan_in", "r"), [(6, 9, 4), (9, 6, 4), (4, 5, 8), (8, 8, 4), (24, 40, 14)])
def test_rotation_turns_each_block_by_its_position(fan_out: int, fan_in: int, r: int) -> None:
    delta = square(r, "rotate", fan_out, fan_in)
    blocks = math.ceil(fan_in / r)
    expected = torch.zeros(fan_out, fan_in, dtype=torch.float64)
    for block in range(blocks):
        turn = torch.zeros(r, r, dtype=torch.float64)
        for j in range(r // 2):
            angle = block * 10000 ** (-2 * j / r)
            turn[j, j] = turn[j + r // 2, j + r // 2] = math.cos(angle)
            turn[j, j + r // 2], turn[j + r // 2, j] = -math.sin(angle), math.sin(angle)
        change = delta.m.detach() @ turn
        for row in range(fan_out):
            place = row % (blocks * r)
            if place // r == block:
                for column in range(r):
                    expected[row, (block * r + column) % fan_in] += change[place % r, column]
    assert torch.allclose(delta.dense(), expected)


def test_ranks_are_far_above_loras() -> None:
    model, _ = net(32, 32, 32)
    for kind, rank in (("share", 11), ("rotate", 32)):
        delta = part(attach(model, dw.MoRA, rank=2, kind=kind))
        with torch.no_grad():
            delta.m.normal_()
        assert torch.linalg.matrix_rank(delta.dense()) == rank
        dw.detach(model)


@pytest.mark.parametrize("kind", ["share", "rotate"])
def test_it_starts_unchanged_with_a_gradient_and_merges_at_any_width(kind: str) -> None:
    model, x = net(13, 9, 5)
    base = model(x)
    tuned = attach(model, dw.MoRA, rank=2, kind=kind)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    for p in tuned.parameters():
        assert p.grad.abs().max() > 0
        with torch.no_grad():
            p.normal_(std=0.3)
    beside = model(x)
    assert not torch.allclose(beside, base)
    dw.merge(model)
    assert torch.allclose(model(x), beside)


@pytest.mark.parametrize("kind", ["share", "rotate"])
def test_gradients_are_the_derivatives(kind: str) -> None:
    delta = square(4, kind, 5, 6)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, m: delta.side(x), (x, delta.m))


def test_the_sides_are_the_papers() -> None:
    for kind, side in (("share", 111), ("rotate", 110)):
        model, _ = net(768, 768, 2)
        assert part(attach(model, dw.MoRA, rank=8, kind=kind)).m.shape == (side, side)


def test_sharing_keeps_the_sums_and_rotation_the_input() -> None:
    model, x = net(32, 32, 32)
    x.requires_grad_()
    attach(model, dw.MoRA, rank=1, kind="share")
    assert [shape for shape in saved_shapes(lambda: model.first(x)) if len(shape) > 1 and 32 in shape] == []
    dw.detach(model)
    attach(model, dw.MoRA, rank=1, kind="rotate")
    assert saved_shapes(lambda: model.first(x)) == [(2, 5, 32)]
