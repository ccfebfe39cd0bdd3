"""What LoHa, LoKr and KronA must hold: their ranks, their counts, and the product without the matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.operators.hadamard import Hadamard
from deltaworks.core.operators.kronecker import Kronecker
from deltaworks.methods.structured.lokr import split
from deltaworks.model.weights import Weight
from tests.methods.toys import attach, net, nudge, part, saved_shapes

SQUARE = Weight(nn.Linear(768, 768))


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rearranged(matrix: Tensor, o1: int, i1: int) -> Tensor:
    """Blocks of a matrix as rows: of rank one for a Kronecker product."""
    o2, i2 = matrix.shape[0] // o1, matrix.shape[1] // i1
    return matrix.view(o1, o2, i1, i2).transpose(1, 2).reshape(o1 * i1, o2 * i2)


# LoHa.


def test_loha_reaches_the_square_of_its_rank() -> None:
    torch.manual_seed(0)
    delta = Hadamard(randn(20, 3), randn(3, 18), randn(20, 3), randn(3, 18), 2.0)
    assert rank(delta.dense()) == 9
    assert torch.allclose(delta.dense(), 2 * (delta.a1 @ delta.b1) * (delta.a2 @ delta.b2))
    assert dw.LoHa(rank=8).count(SQUARE) == 24_576 == dw.LoRA(rank=16).count(SQUARE)


@pytest.mark.parametrize("init", ["peft", "lycoris"])
def test_loha_starts_at_the_base_with_three_factors_set(init: str) -> None:
    model, x = net()
    base = model(x)
    tuned = attach(model, dw.LoHa, rank=2, init=init)
    assert torch.equal(model(x), base)
    assert sum(not bool(p.any()) for p in part(tuned).parameters()) == 1
    model(x).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in tuned.parameters())


def test_loha_keeps_only_the_input_for_backward() -> None:
    model, x = net(40, 32, 6)
    nudge(attach(model, dw.LoHa, rank=2))
    x.requires_grad_()
    assert (32, 40) not in saved_shapes(lambda: model.first(x))


# LoKr and KronA.


def kronecker(thin1: bool = False, thin2: bool = False, sides=((2, 3), (4, 5))) -> Kronecker:
    torch.manual_seed(0)
    (o1, i1), (o2, i2) = sides
    given = {"w1_a": randn(o1, 2), "w1_b": randn(2, i1)} if thin1 else {"w1": randn(o1, i1)}
    given |= {"w2_a": randn(o2, 2), "w2_b": randn(2, i2)} if thin2 else {"w2": randn(o2, i2)}
    return Kronecker(**given, scale=0.7)


@pytest.mark.parametrize("sides", [((2, 3), (4, 5)), ((6, 1), (2, 5)), ((1, 4), (7, 3))])
@pytest.mark.parametrize("thin", [(False, False), (False, True), (True, True)])
def test_the_fast_product_is_kron_in_outputs_and_gradients(thin, sides) -> None:
    delta = kronecker(*thin, sides)
    w1, w2 = delta.factors()
    assert torch.allclose(delta.dense(), 0.7 * torch.kron(w1.contiguous(), w2.contiguous()))
    x = randn(2, 3, sides[0][1] * sides[1][1]).requires_grad_()
    fast, dense = delta.side(x), x @ delta.dense().T
    assert torch.allclose(fast, dense)
    g = torch.randn_like(fast)
    own = [x, *delta.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, own, g) for y in (fast, dense)), strict=True):
        assert torch.allclose(a, b)


def test_backward_keeps_the_input_and_the_factors_only() -> None:
    delta, x = kronecker(), randn(7, 15).requires_grad_()
    assert saved_shapes(lambda: delta.side(x)) == [(7, 15)]


def test_the_rearranged_matrix_has_rank_one_and_ranks_multiply() -> None:
    delta = kronecker(thin1=True, sides=((4, 3), (4, 5)))
    w1, w2 = delta.factors()
    assert rank(rearranged(delta.dense(), 4, 3)) == 1
    assert rank(delta.dense()) == rank(w1) * rank(w2) == 2 * 4


@pytest.mark.parametrize(
    ("size", "factor", "wanted"),
    [
        (768, -1, (24, 32)),
        (256, -1, (16, 16)),
        (128, 4, (4, 32)),
        (127, -1, (1, 127)),
        (12, 5, (3, 4)),
        (48, 16, (16, 3)),
    ],
)
def test_sides_are_split_as_the_field_does(size: int, factor: int, wanted: tuple[int, int]) -> None:
    assert split(size, factor) == wanted
    assert split(size, factor, ordered=True) == tuple(sorted(wanted))


def test_lokr_counts_and_switches_exactly_at_half_the_larger_side() -> None:
    assert dw.LoKr(rank=8).count(SQUARE) == 24 * 24 + 8 * 64 == 1088
    model = nn.Sequential(nn.Linear(768, 768))
    for r, full in ((15, False), (16, True), (17, True)):
        tuned = dw.attach(model, dw.LoKr(on=nn.Linear, rank=r))
        (delta,) = tuned.parts()
        assert ("w2" in dict(delta.named_parameters())) == full
        assert sum(p.numel() for p in tuned.parameters()) == tuned.method.count(SQUARE)
        dw.detach(model)
    for r, full in ((11, False), (12, True)):
        (delta,) = dw.attach(model, dw.LoKr(on=nn.Linear, rank=r, both=True)).parts()
        assert ("w1" in dict(delta.named_parameters())) == full
        dw.detach(model)


@pytest.mark.parametrize("make", [lambda: nn.Linear(48, 24), lambda: nn.Conv2d(24, 8, 3)])
@pytest.mark.parametrize("factor", [-1, 3, 8, 12])
def test_lokr_has_the_sides_of_lycoris_where_told_also_for_a_factor_above_the_root(make, factor: int) -> None:
    modules = pytest.importorskip("lycoris.modules.lokr")
    for both in (False, True):
        theirs = modules.LokrModule("one", make(), lora_dim=1, alpha=2, factor=factor, decompose_both=both)
        model = nn.Sequential(make())
        method = dw.LoKr(on="^0$", rank=1, alpha=2.0, factor=factor, both=both, init="lycoris")
        (ours,) = dw.attach(model, method).parts()
        wanted = {name.removeprefix("lokr_"): list(value.shape) for name, value in theirs.named_parameters()}
        assert {name: list(value.shape) for name, value in ours.named_parameters()} == wanted


@pytest.mark.parametrize("init", ["peft", "lycoris"])
def test_lokr_starts_at_the_base_and_lycoris_scales_full_factors_by_one(init: str) -> None:
    model, x = net()
    base = model(x)
    tuned = attach(model, dw.LoKr, rank=8, alpha=4.0, init=init)
    assert torch.equal(model(x), base)
    assert part(tuned).scale == (1.0 if init == "lycoris" else 0.5)


def test_lokr_refuses_a_factor_of_nothing() -> None:
    with pytest.raises(ValueError, match="lokr: factor=0 is not allowed"):
        dw.LoKr(factor=0)


def test_krona_is_smallest_where_its_factors_are_one_size() -> None:
    assert dw.KronA().count(SQUARE) == 24 * 32 + 32 * 24 == 1536
    assert dw.KronA(rows=64, columns=8).count(SQUARE) == 64 * 8 + 12 * 96


def test_krona_is_lokr_with_full_factors() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.KronA, on="first", scale=2.0, rows=2, columns=3)
    twin, _ = net(12, 8, 6)
    same = attach(twin, dw.LoKr, on="first", rank=8, alpha=16.0)
    nudge(tuned)
    ours, theirs = part(tuned), part(same)
    with torch.no_grad():
        theirs.w1.copy_(ours.w1)
        theirs.w2.copy_(ours.w2)
    assert torch.allclose(model.first(x), twin.first(x))


def test_krona_starts_at_the_base_and_names_a_side_that_does_not_divide() -> None:
    model, x = net()
    base = model(x)
    attach(model, dw.KronA)
    assert torch.equal(model(x), base)
    with pytest.raises(ValueError, match="krona: rows=5 does not divide the 8 of first"):
        attach(net()[0], dw.KronA, rows=5)
