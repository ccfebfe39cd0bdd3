"""MELoRA: low-rank blocks on the diagonal."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators import block_low_rank
from deltaworks.core.operators.block_low_rank import BlockLowRank, UnequalBlocks
from deltaworks.model.weights import Weight
from tests.families import FAMILIES
from tests.methods.toys import assert_stored_and_merged, attach, net, nudge, part, saved_shapes, steps


def start(**settings):
    model, x = net(12, 8, 4)
    tuned = attach(model, dw.MELoRA, **({"n": 2} | ({} if "ranks" in settings else {"rank": 2}) | settings))
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


LAYOUTS = pytest.mark.parametrize(
    "layout", [{}, {"ranks": [1, 3]}, {"n": 4, "ranks": [2, 1, 3, 1], "alphas": [4, 8, 1, 2]}]
)


@LAYOUTS
def test_the_product_is_the_matrix_in_outputs_and_gradients(layout: dict) -> None:
    _, x, tuned = start(**layout)
    delta = part(tuned)
    x.requires_grad_()
    fast, dense = delta.side(x), x @ delta.dense().T
    g = torch.randn_like(fast)
    assert torch.allclose(fast, dense)
    wanted = (x, delta.a, delta.b)
    for a, b in zip(torch.autograd.grad(fast, wanted, g), torch.autograd.grad(dense, wanted, g), strict=True):
        assert torch.allclose(a, b)


@LAYOUTS
@pytest.mark.parametrize("few", [0, 8])
def test_dropout_gradients_match_the_mask(layout: dict, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_low_rank, "FEW", few)
    model, x, tuned = start(dropout=0.5, **layout)
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


def test_minis_have_ranks_and_scales_of_their_own() -> None:
    model, x, tuned = start(ranks=[1, 3], alpha=6.0)
    delta = part(tuned)
    assert isinstance(delta, UnequalBlocks) and delta.scales == [6.0, 2.0]
    (a1, a2), (b1, b2) = delta.a.split([1, 3]), delta.b.split([1, 3])
    expected = torch.block_diag(6.0 * b1.T @ a1, 2.0 * b2.T @ a2)
    assert torch.allclose(delta.dense(), expected)
    blocks = delta.dense().view(2, 4, 2, 6)
    assert [int(torch.linalg.matrix_rank(blocks[i, :, i])) for i in range(2)] == [1, 3]
    assert not blocks[0, :, 1].any() and not blocks[1, :, 0].any()
    with dw.disable(model):
        base = model.first(x)
    assert torch.allclose(model.first(x), base + x @ expected.T)


def test_padding_is_neither_trained_nor_stored_nor_counted(tmp_path) -> None:
    layout = {"n": 4, "ranks": [1, 4, 2, 1], "alphas": [8, 4, 2, 1]}
    model, x = net(12, 8, 4)
    base = model(x)
    tuned = attach(model, dw.MELoRA, **layout)
    assert torch.equal(model(x), base)
    counts = [8 * (12 + 8) // 4, 8 * (8 + 4) // 4]
    assert [sum(p.numel() for p in one.parameters()) for one in tuned.parts()] == counts
    assert [dw.MELoRA(**layout).count(Weight(layer)) for layer in (model.first, model.second)] == counts
    assert sum(t.numel() for t in tuned.tensors().values()) == sum(counts)
    list(steps(model, x, tuned, 3))
    assert not torch.equal(model(x), base)
    assert_stored_and_merged(model, net(12, 8, 4)[0], x, tmp_path)


def test_training_keeps_no_more_than_every_mini_s_own_rank() -> None:
    model, x, _ = start(ranks=[1, 3])
    x.requires_grad_()
    kept = [shape for shape in saved_shapes(lambda: model.first(x)) if shape[0] in (2, 10)]
    assert sorted(kept) == [(2, 5, 12), (10, 1), (10, 3)]


def test_many_minis_are_one_batched_product_and_few_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for few in (0, 8):
        monkeypatch.setattr(block_low_rank, "FEW", few)
        model, x, tuned = start(n=4, ranks=[3, 1, 1, 2])
        y = model(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(tuned.parameters()))])
    assert all(torch.allclose(one, other) for one, other in zip(*found, strict=True))


def test_equal_ranks_are_the_plain_form_bit_for_bit() -> None:
    outputs = []
    for settings in ({"rank": 3}, {"ranks": [3, 3]}, {"ranks": [3, 3], "alphas": [16, 16.0]}):
        model, x, tuned = start(**settings)
        assert type(part(tuned)) is BlockLowRank
        list(steps(model, x, tuned, 2))
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_experts_have_minis_of_unequal_ranks(tmp_path) -> None:
    model, batch = FAMILIES["mixtral"]()
    base = model(**batch).logits
    nudge(dw.attach(model, dw.MELoRA(ranks=[1, 2], on="expert.down"), seed=0), 0.3)
    expected = model(**batch).logits
    assert not torch.allclose(expected, base)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = FAMILIES["mixtral"]()
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": [1, 2, 3]}, r"ranks=\[1, 2, 3\] is not one for each of n=2"),
        ({"alphas": [4.0]}, r"alphas=\[4.0\] is not one for each of n=2"),
        ({"ranks": [0, 2]}, "whole numbers of at least 1"),
        ({"ranks": [2, 4], "rank": 4}, "rank=4 is for ranks=None"),
        ({"alphas": [2, -1]}, "numbers above 0"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dw.MELoRA(**settings)


def test_ranks_are_read_from_a_command_line_and_overridden_at_a_place() -> None:
    method = dw.method("melora", ranks="[1, 3]", overrides={"second": {"ranks": [2, 1]}}, on=torch.nn.Linear)
    assert [one.ranks for one in dw.attach(net(12, 8, 4)[0], method).parts()] == [[1, 3], [2, 1]]
