"""MELoRA: low-rank blocks on the diagonal."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part, saved_shapes


def start(**settings):
    model, x = net(12, 8, 4)
    tuned = attach(model, dw.MELoRA, **({"rank": 2, "n": 2} | settings))
    nudge(tuned)
    return model, x, tuned


def test_the_rank_is_the_sum_and_the_rest_is_exactly_zero() -> None:
    model, _ = net(12, 8, 4)
    delta = part(attach(model, dw.MELoRA, rank=1, n=4))
    with torch.no_grad():
        delta.b.normal_()
    assert torch.linalg.matrix_rank(delta.dense()) == 4
    blocks = delta.dense().view(4, 2, 4, 3)
    for i in range(4):
        for j in range(4):
            assert (blocks[i, :, j].abs().max() > 0) == (i == j)


def test_a_slice_of_the_input_reaches_its_slice_of_the_output_only() -> None:
    model, x, _ = start()
    with dw.disable(model):
        base = model.first(x)
    branch = model.first(x) - base
    other = x.clone()
    other[..., :6] += 1
    with dw.disable(model):
        base = model.first(other)
    moved = (model.first(other) - base - branch).abs().amax((0, 1))
    assert (moved[:4] > 1e-6).all() and (moved[4:] < 1e-12).all()


def test_the_product_is_the_matrix_in_outputs_and_gradients() -> None:
    _, x, tuned = start()
    delta = part(tuned)
    x.requires_grad_()
    fast, dense = delta.side(x), x @ delta.dense().T
    g = torch.randn_like(fast)
    assert torch.allclose(fast, dense)
    wanted = (x, delta.a, delta.b)
    for a, b in zip(torch.autograd.grad(fast, wanted, g), torch.autograd.grad(dense, wanted, g), strict=True):
        assert torch.allclose(a, b)


def test_dropout_gradients_match_the_mask() -> None:
    model, x, tuned = start(dropout=0.5)
    model.train()

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model(inputs[0])

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *tuned.parameters()))


def test_one_block_is_lora_bit_for_bit() -> None:
    outputs = []
    for method, settings in ((dw.MELoRA, {"n": 1}), (dw.LoRA, {})):
        model, x = net()
        nudge(attach(model, method, rank=2, **settings))
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_the_number_of_parameters_does_not_depend_on_n() -> None:
    assert {sum(p.numel() for p in start(n=n)[2].parameters()) for n in (1, 2, 4)} == {2 * (12 + 8 + 8 + 4)}


def test_training_keeps_the_input_and_the_narrow_product() -> None:
    model, x, _ = start()
    x.requires_grad_()
    assert sorted(saved_shapes(lambda: model.first(x))) == [(2, 5, 12), (10, 2), (10, 2)]


def test_a_number_that_does_not_divide_is_refused() -> None:
    model, _ = net(12, 8, 6)
    with pytest.raises(ValueError, match=r"n=3 does not divide both sides of first \(8 x 12\)"):
        attach(model, dw.MELoRA, n=3)
