"""What HRA, OFT and BOFT must hold: lengths and angles stay, the input is turned, no large matrix is made."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.operators.rotation import BlockRotation, Butterfly, Householder, Rotation, cayley, neumann
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps

METHODS = [
    dw.HRA(on=nn.Linear, rank=4),
    dw.OFT(on=nn.Linear, block=4, terms=None),
    dw.BOFT(on=nn.Linear, block=2, stages=2),
]
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)


def rotated(method: dw.core.method.Method, size: float = 0.4) -> tuple[nn.Module, Tensor, dw.Tuned]:
    model, x = net(12, 8, 6)
    tuned = dw.attach(model, method, seed=0)
    nudge(tuned, size)
    return model, x, tuned


@every
def test_the_rows_keep_their_lengths_and_angles(method) -> None:
    model, _, tuned = rotated(method)
    delta = part(tuned)
    if isinstance(delta, Butterfly):
        with torch.no_grad():
            delta.s.fill_(1)
    weight = model.first.weight.detach()
    folded = delta.fold(weight)
    assert not torch.allclose(folded, weight, atol=1e-2)
    assert torch.allclose(folded @ folded.T, weight @ weight.T)
    assert torch.allclose(torch.linalg.svdvals(folded), torch.linalg.svdvals(weight))


@every
def test_turning_the_input_is_turning_the_weight_in_outputs_and_gradients(method) -> None:
    model, x, tuned = rotated(method)
    x.requires_grad_()
    delta = part(tuned)
    y = model.first(x)
    dense = nn.functional.linear(x, delta.fold(model.first.weight), model.first.bias)
    assert torch.allclose(y, dense)
    g = torch.randn_like(y)
    own = [x, *delta.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, own, g) for out in (y, dense)), strict=True):
        assert torch.allclose(a, b)


@every
def test_nothing_as_large_as_the_weight_is_made_or_kept(method) -> None:
    model, x = net(128, 96, 6)
    nudge(dw.attach(model, method, seed=0))
    x.requires_grad_()
    assert max(math.prod(shape) for shape in saved_shapes(lambda: model.first(x))) < model.first.weight.numel() / 2


@every
def test_a_part_of_a_fused_projection_is_turned_by_itself(method) -> None:
    settings = {**method.settings(), "on": "attention.value"}
    model, batch = FAMILIES["phi3"]()
    layer = model.model.layers[0].self_attn.qkv_proj
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    model(**batch)
    tuned = dw.attach(model, type(method)(**settings))
    nudge(tuned, 0.3)
    model(**batch)
    dw.merge(model)
    model(**batch)
    assert torch.allclose(seen[1][..., :48], seen[0][..., :48], atol=1e-6)
    assert not torch.allclose(seen[1][..., 48:], seen[0][..., 48:], atol=1e-2)
    assert torch.allclose(seen[2], seen[1], atol=1e-5)


# HRA.


def test_hra_is_its_chain_of_reflections() -> None:
    _, _, tuned = rotated(dw.HRA(on=nn.Linear, rank=4))
    delta = part(tuned)
    assert isinstance(delta, Householder)
    chain = torch.eye(12, dtype=torch.float64)
    for u in (delta.u / delta.u.norm(dim=0)).T:
        chain = chain @ (torch.eye(12, dtype=torch.float64) - 2 * torch.outer(u, u))
    assert torch.allclose(delta.fold(torch.eye(12, dtype=torch.float64)), chain)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_hra_changes_rank_r_and_mirrors_by_its_parity(rank: int) -> None:
    delta = Householder(torch.randn(12, rank, dtype=torch.float64))
    one = torch.eye(12, dtype=torch.float64)
    weight = torch.randn(8, 12, dtype=torch.float64)
    assert torch.linalg.matrix_rank(delta.fold(weight) - weight) == rank
    assert torch.allclose(torch.linalg.det(delta.fold(one)), torch.tensor((-1.0) ** rank, dtype=torch.float64))


def test_hra_needs_pairs_to_start_at_the_base_unless_it_is_strict() -> None:
    with pytest.raises(ValueError, match="hra: rank=3 is not allowed"):
        dw.HRA(rank=3)
    model, x = net()
    base = model(x)
    attach(model, dw.HRA, rank=3, strict=True)
    assert not torch.allclose(model(x), base, atol=1e-3)
    delta = part(dw.tuned(model))
    u = delta.compact(delta.u)[0]
    assert torch.allclose(u.T @ u, torch.eye(3, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize(("strict", "bound"), [(False, 1 / 2), (True, 1 / math.sqrt(8))])
def test_hra_draws_columns_as_long_as_the_fields_other_implementation(strict: bool, bound: float) -> None:
    tuned = dw.attach(nn.Sequential(nn.Linear(300, 4)), dw.HRA(on=nn.Linear, rank=8, strict=strict), seed=0)
    (delta,) = tuned.parts()
    assert 0.98 * bound < delta.u.abs().max() <= bound
    assert torch.equal(delta.u[:, ::2], delta.u[:, 1::2]) == (not strict)


def test_hra_penalty_is_the_formula_and_drives_pairs_apart() -> None:
    model, x = net()
    tuned = attach(model, dw.HRA, rank=2, penalty=0.5)
    rules = tuned.run(10)
    # Two equal unit vectors: the off-diagonal ones count twice, at two sites.
    assert rules.penalty().item() == pytest.approx(0.5 * 2 * 2)
    nudge(tuned)
    before = rules.penalty().item()
    for _ in steps(model, x, tuned, 40):
        pass
    assert rules.penalty().item() < before
    assert dw.HRA(rank=2, penalty=0.0).rules() == []


# OFT.


def test_oft_blocks_are_rotations_and_their_number_of_values_is_the_sheets() -> None:
    assert dw.OFT(block=32).count(dw.model.weights.Weight(nn.Linear(768, 768))) == 11_904
    _, _, tuned = rotated(dw.OFT(on=nn.Linear, block=4, terms=None), 1.0)
    delta = part(tuned)
    assert isinstance(delta, BlockRotation)
    r = delta.rotations()
    assert torch.allclose(r @ r.mT, torch.eye(4, dtype=torch.float64).expand_as(r), atol=1e-12)


def test_oft_series_comes_closer_with_small_matrices_and_more_terms() -> None:
    torch.manual_seed(0)
    k = torch.randn(4, 4, dtype=torch.float64)
    k = k - k.T

    def error(size: float, terms: int) -> float:
        return (neumann(size * k, terms) - cayley(size * k)).norm().item()

    assert error(0.01, 5) < error(0.05, 5) < error(0.2, 5)
    assert error(0.05, 9) < error(0.05, 6) < error(0.05, 4)


def test_oft_takes_the_nearest_block_that_divides_the_input() -> None:
    model, x = net(15, 8, 6)
    tuned = attach(model, dw.OFT, block=4)
    assert [p.block for p in tuned.parts()] == [3, 4]
    model(x)


def test_oft_shares_one_rotation_where_told() -> None:
    model, _ = net()
    tuned = attach(model, dw.OFT, block=4, share=True, terms=None)
    nudge(tuned)
    whole = part(tuned).turned(torch.eye(12, dtype=torch.float64))
    assert torch.equal(whole[:4, :4], whole[8:, 8:]) and part(tuned).k.shape == (1, 6)


def test_oft_leash_holds_after_every_step() -> None:
    model, x = net()
    tuned = attach(model, dw.OFT, block=4, eps=0.05)
    for _ in steps(model, x, tuned, 5):
        for delta in tuned.parts():
            skew = delta.k.detach().norm(dim=1) * math.sqrt(2)
            assert (skew <= 0.05 / math.sqrt(len(delta.k)) + 1e-12).all() and skew.max() > 0


def test_the_rules_of_rotations_reach_the_experts_of_a_fused_layer() -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.HRA(rank=2, penalty=0.5), name="hra")
    chains = [u.shape[0] if u.dim() == 3 else 1 for u in tuned.parameters()]
    assert max(chains) > 1
    assert tuned.run(1).penalty().item() == pytest.approx(0.5 * 2 * sum(chains), rel=1e-5)
    dw.detach(model)
    tuned = dw.attach(model, dw.OFT(block=4, eps=0.01))
    rules = tuned.run(2, optimizer=torch.optim.SGD(tuned.parameters(), lr=10.0))
    for _ in range(2):
        rules.step(lambda: model(**batch).loss)
    turned = [k.detach() for k in tuned.parameters()]
    assert any(k.dim() == 3 for k in turned)
    for k in turned:
        assert (k.norm(dim=-1) * math.sqrt(2) <= 0.01 / math.sqrt(k.shape[-2]) + 1e-7).all()
    assert max(k.abs().max() for k in turned) > 0


# BOFT.


def test_boft_with_all_stages_has_no_zero_and_with_one_is_oft() -> None:
    torch.manual_seed(0)
    one = torch.eye(16, dtype=torch.float64)
    full = Butterfly(torch.randn(4, 4, 4, 4, dtype=torch.float64)[:3], torch.ones(5))
    assert (full.turned(one).abs() > 1e-9).all()
    p = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    single = Butterfly(p, torch.ones(5))
    rows, columns = torch.triu_indices(4, 4, 1)
    blocks = BlockRotation(((p[0].mT - p[0]) / 2)[:, rows, columns], 4, 16)
    assert torch.allclose(single.turned(one), blocks.turned(one))


def test_boft_stages_pair_half_blocks_at_doubling_distance() -> None:
    torch.manual_seed(0)
    for stage, partner in ((0, 1), (1, 2), (2, 4)):
        p = torch.zeros(3, 4, 4, 4, dtype=torch.float64)
        p[stage].normal_()
        reach = Butterfly(p, torch.ones(5)).turned(torch.eye(16, dtype=torch.float64)).abs() > 1e-9
        half_blocks = reach.unflatten(0, (8, 2)).unflatten(2, (8, 2)).any(3).any(1)
        for h in range(8):
            assert set(half_blocks[h].nonzero().flatten().tolist()) == {h, h ^ partner}


def test_boft_counts_what_it_stores_and_scales_outputs_but_not_the_bias() -> None:
    assert dw.BOFT(block=8, stages=2).count(dw.model.weights.Weight(nn.Linear(768, 768))) == 12_288 + 768
    model, x = net()
    tuned = attach(model, dw.BOFT, block=4)
    bare = model.first(x) - model.first.bias
    with torch.no_grad():
        part(tuned).s.fill_(3)
    assert torch.allclose(model.first(x), 3 * bare + model.first.bias)


def test_boft_says_what_width_it_needs() -> None:
    model, _ = net(10, 8, 6)
    with pytest.raises(ValueError, match=r"boft: block=4 and stages=1 need .* divisible by 4; first has 10"):
        attach(model, dw.BOFT)
    with pytest.raises(ValueError, match="boft: block=3 is not allowed"):
        dw.BOFT(block=3, stages=2)


def test_every_rotation_starts_at_the_base() -> None:
    for method in METHODS:
        model, x = net()
        base = model(x)
        dw.attach(model, method)
        assert all(isinstance(delta, Rotation) for delta in dw.tuned(model).parts())
        assert torch.allclose(model(x), base, atol=1e-12)
