"""SURM: structured tiles against the matrices that define them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import deltaworks as dw
from deltaworks.core.operators.circulant import Circulant
from deltaworks.core.operators.structured_tiles import STRUCTURES, StructuredTiles
from deltaworks.model.weights import Weight
from tests.methods.toys import assert_stored_and_merged, attach, net, nudge, part, saved_shapes


def made(structure: str, rows: int = 2, columns: int = 3, n: int = 5, pairs: int = 1) -> StructuredTiles:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, columns, pairs, n, dtype=torch.float64, generator=g) for _ in "ab")
    return StructuredTiles(a, b, structure, scale=0.5)


def circulant(c: Tensor, sign: float = 1.0) -> Tensor:
    """First column c; entries above the diagonal multiplied by `sign`."""
    n = len(c)
    return torch.stack([torch.stack([c[(p - q) % n] * (sign if q > p else 1) for q in range(n)]) for p in range(n)])


def toeplitz(v: Tensor) -> Tensor:
    n = torch.arange(len(v))
    return v[(n - n.unsqueeze(1)).abs()]


def defined(delta: StructuredTiles) -> Tensor:
    def tile(a: Tensor, b: Tensor) -> Tensor:
        if delta.structure == "circulant":
            return circulant((b * a)[0])
        if delta.structure == "toeplitz":
            return toeplitz(b[0]) @ toeplitz(a[0])
        return torch.stack([circulant(b[t]) @ circulant(a[t], -1.0) for t in range(len(a))]).sum(0)

    rows, columns = delta.a.shape[:2]
    grid = [torch.cat([tile(delta.a[i, j], delta.b[i, j]) for j in range(columns)], 1) for i in range(rows)]
    return delta.scale * torch.cat(grid)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n", [1, 5, 6])
def test_the_transform_is_the_matrix_in_outputs_and_gradients(structure: str, n: int) -> None:
    delta = made(structure, n=n, pairs=2 if structure == "ldr" else 1)
    assert torch.allclose(delta.dense(), defined(delta))
    x = torch.randn(2, 3, 3 * n, dtype=torch.float64, requires_grad=True)
    fast, dense = delta.side(x), x @ defined(delta).T
    g = torch.randn_like(fast)
    assert torch.allclose(fast, dense)
    for a, b in zip(*(torch.autograd.grad(y, (x, delta.a, delta.b), g) for y in (fast, dense)), strict=True):
        assert torch.allclose(a, b)


def test_circulants_commute_with_the_shift_and_displacement_ranks_are_low() -> None:
    n = 8
    shift = torch.roll(torch.eye(n, dtype=torch.float64), 1, 0)
    m = made("circulant", 1, 1, n).dense()
    assert torch.allclose(m @ shift, shift @ m)
    skew = shift.clone()
    skew[0, -1] = -1
    for pairs in (1, 2):
        m = made("ldr", 1, 1, n, pairs).dense()
        assert torch.linalg.matrix_rank(shift @ m - m @ skew, atol=1e-10) <= pairs


@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_values_a_feature_reach_full_rank(structure: str) -> None:
    delta = made(structure, 1, 1, 8)
    assert torch.linalg.matrix_rank(delta.dense()) == 8 and sum(p.numel() for p in delta.parameters()) == 16


@pytest.mark.parametrize("structure", [*STRUCTURES, "kronecker"])
def test_every_structure_starts_unchanged_and_merges(structure: str) -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.SURM, structure=structure)
    assert torch.equal(model(x), base)
    nudge(tuned)
    beside = model(x)
    assert not torch.allclose(beside, base)
    dw.merge(model)
    assert torch.allclose(model(x), beside)


def test_the_kronecker_product_has_the_small_factor_inside() -> None:
    model, _ = net(12, 8, 6)
    tuned = attach(model, dw.SURM, structure="kronecker", rank=4, alpha=2.0)
    nudge(tuned)
    delta = part(tuned)
    assert delta.w1.shape == (2, 4) and delta.w2.shape == (4, 3)
    assert torch.allclose(delta.dense(), 0.5 * torch.kron(delta.w1, delta.w2))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tile=3 does not divide first \(8 x 12\); take a divisor of 4, or none"):
        attach(net(12, 8, 6)[0], dw.SURM, tile=3)
    with pytest.raises(ValueError, match="pairs=2 is for structure='ldr'"):
        dw.SURM(pairs=2)
    for given in ({"dropout": 0.1}, {"tile": 2}, {"train_scale": True}):
        with pytest.raises(ValueError, match="neither dropout nor tiles nor train_scale"):
            dw.SURM(structure="kronecker", **given)
    for name in ("rank", "alpha"):
        with pytest.raises(ValueError, match=f"surm: {name}=4 is for structure='kronecker', not circulant"):
            dw.SURM(**{name: 4})
    with pytest.raises(ValueError, match="scale=1.5 is for structure='circulant' or .*, not kronecker"):
        dw.SURM(structure="kronecker", scale=1.5)
    with pytest.raises(ValueError, match="scale=2 and train_scale=True are both given"):
        dw.SURM(scale=2.0, train_scale=True)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_scale_that_trains_starts_at_zero_and_can_leave_it(structure: str, tmp_path: Path) -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.SURM, structure=structure, on="first", train_scale=True)
    delta = part(tuned)
    assert torch.equal(model(x), base) and delta.s.item() == 0
    assert sum(p.numel() for p in tuned.parameters()) == tuned.method.count(Weight(model.first))
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - base.detach() - 1).square().sum().backward()
        optimizer.step()
    assert delta.s.item() != 0 and delta.a.grad.abs().sum() > 0 and delta.b.grad.abs().sum() > 0
    twin = StructuredTiles(delta.a.detach(), delta.b.detach(), structure, delta.s.item())
    inputs = torch.randn(3, 12, dtype=delta.a.dtype)
    assert torch.allclose(delta.dense(), twin.dense()) and torch.allclose(delta.side(inputs), inputs @ twin.dense().T)
    g = torch.randn(8, 12, dtype=delta.a.dtype)
    wanted = torch.autograd.grad((delta.dense() * g).sum(), (delta.a, delta.b, delta.s))
    for found, slope in zip(delta.pulled(model.first.weight, g.clone()), wanted, strict=True):
        assert torch.allclose(found, slope)
    assert_stored_and_merged(model, net(12, 8, 6)[0], x, tmp_path)


@pytest.mark.parametrize("train_scale", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (12, 8, 6)])
def test_a_circulant_is_kept_as_one_vector(sizes: tuple[int, ...], train_scale: bool, tmp_path: Path) -> None:
    model, x = net(*sizes)
    settings = {"train_scale": True} if train_scale else {"scale": 0.5}
    tuned = attach(model, dw.SURM, on="first", **settings)
    nudge(tuned, 0.3)
    delta, before = part(tuned), model(x)
    change, trained = delta.dense(), delta.a.numel()
    tuned.run(1).emit("finished")
    assert [tensor.numel() for tensor in tuned.tensors().values()] == [trained]
    assert torch.allclose(part(tuned).dense(), change) and torch.allclose(model(x), before)
    dw.save(model, tmp_path)
    fresh, _ = net(*sizes)
    dw.load(fresh, tmp_path)
    assert torch.allclose(fresh(x), before)


@pytest.mark.parametrize("structure", ["toeplitz", "ldr", "kronecker"])
def test_other_structures_are_kept_as_they_trained(structure: str) -> None:
    tuned = attach(net(12, 8, 6)[0], dw.SURM, structure=structure, overrides={"second": {"structure": "circulant"}})
    kinds = [type(one) for one in tuned.parts()]
    tuned.run(1).emit("finished")
    assert [type(one) for one in tuned.parts()] == [kinds[0], Circulant]


def test_training_keeps_the_input_only() -> None:
    model, x = net(64, 32, 32)
    attach(model, dw.SURM)
    x.requires_grad_()
    assert saved_shapes(lambda: model.first(x)) == [(2, 5, 64)]
