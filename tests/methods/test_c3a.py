"""C3A: circulant blocks."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.circulant import Circulant
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part, saved_shapes


def circulant(rows: int, columns: int, b: int, **settings) -> Circulant:
    generator = torch.Generator().manual_seed(0)
    return Circulant(torch.randn(rows, columns, b, dtype=torch.float64, generator=generator), **settings)


@pytest.mark.parametrize(("rows", "columns", "b"), [(2, 3, 4), (3, 1, 5), (1, 1, 6), (2, 2, 1)])
def test_every_block_is_circulant_and_its_first_row_is_the_vector(rows: int, columns: int, b: int) -> None:
    delta = circulant(rows, columns, b, scale=0.5)
    blocks = delta.dense().view(rows, b, columns, b).transpose(1, 2)
    for i in range(rows):
        for j in range(columns):
            for p in range(b):
                assert torch.allclose(blocks[i, j, p], 0.5 * delta.w[i, j].roll(p))


@pytest.mark.parametrize(("rows", "columns", "b"), [(2, 3, 4), (3, 1, 5), (1, 1, 6), (2, 2, 1)])
def test_the_transform_agrees_with_the_matrix_in_outputs_and_gradients(rows: int, columns: int, b: int) -> None:
    delta = circulant(rows, columns, b, scale=0.7)
    x = torch.randn(2, 3, columns * b, dtype=torch.float64, requires_grad=True)
    fast, dense = delta.side(x), x @ delta.dense().T
    assert torch.allclose(fast, dense)
    g = torch.randn_like(fast)
    for a, b_ in zip(*(torch.autograd.grad(y, (x, delta.w), g) for y in (fast, dense)), strict=True):
        assert torch.allclose(a, b_)
    assert torch.autograd.gradcheck(lambda x, w: delta.side(x), (x, delta.w))


def test_few_values_reach_full_rank() -> None:
    delta = circulant(1, 1, 16)
    assert torch.linalg.matrix_rank(delta.dense()) == 16
    assert delta.w.numel() == 16


def test_training_keeps_the_input_only() -> None:
    model, x = net(64, 32, 32)
    attach(model, dw.C3A)
    x.requires_grad_()
    assert saved_shapes(lambda: model.first(x)) == [(2, 5, 64)]


def test_the_largest_block_that_fits_is_the_default_and_any_shape_works() -> None:
    model, x = net(12, 8, 7)
    tuned = attach(model, dw.C3A)
    assert [delta.block for delta in tuned.parts()] == [4, 1]
    nudge(tuned)
    assert model(x).isfinite().all()


def test_a_block_that_does_not_fit_is_refused_with_those_that_would() -> None:
    model, _ = net(12, 8, 6)
    with pytest.raises(ValueError, match=r"block=3 does not divide first \(8 x 12\); take a divisor of 4, or none"):
        attach(model, dw.C3A, block=3)


def test_normalising_divides_by_the_input_width() -> None:
    changes = []
    for normalise in (True, False):
        model, _ = net(12, 8, 6)
        changes.append(part(attach(model, dw.C3A, normalise=normalise)).dense())
    assert torch.allclose(12 * changes[0], changes[1])


def test_zeros_leave_the_output_unchanged_and_other_starts_do_not() -> None:
    for init, same in (("zeros", True), ("xavier", False), ("normal", False), ("kaiming", False)):
        model, x = net()
        base = model(x)
        attach(model, dw.C3A, init=init)
        assert torch.allclose(model(x), base, atol=1e-14) == same


def test_dropout_gradients_match_the_mask() -> None:
    model, x = net(8, 8, 8)
    tuned = attach(model, dw.C3A, dropout=0.5)
    nudge(tuned)
    model.train()
    assert not torch.equal(model(x), model(x))

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model(inputs[0])

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *tuned.parameters()))


def test_half_precision_is_transformed_in_single() -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model.bfloat16(), dw.C3A(), seed=0)
    model(**batch).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in tuned.parameters())
