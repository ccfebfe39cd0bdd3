"""HRA, OFT, BOFT, LoHa and LoKr compute what `peft` computes: outputs and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.rotation import BlockRotation
from tests.methods.toys import net
from tests.parity.twins import assert_equal, close, layer, twins

peft = pytest.importorskip("peft")
BOTH = ["first", "second"]


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("strict", [False, True])
def test_hra(strict: bool) -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return {"u": layer.hra_u["default"]}

    method = dw.HRA(on=nn.Linear, rank=4, strict=strict)
    config = peft.HRAConfig(r=4, apply_GS=strict, target_modules=BOTH)
    assert_equal(*twins(method, config, translate), translate, tolerance=1e-9)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("terms", [4, 5, 7])
def test_oft_by_its_series(share: bool, terms: int) -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return {"k": layer.oft_R["default"].weight}

    method = dw.OFT(on=nn.Linear, block=4, share=share, terms=terms)
    config = peft.OFTConfig(
        r=0, oft_block_size=4, block_share=share, num_cayley_neumann_terms=terms, target_modules=BOTH
    )
    assert_equal(*twins(method, config, translate), translate)


def test_oft_by_the_exact_transform_with_the_other_sign() -> None:
    method = dw.OFT(on=nn.Linear, block=4, terms=None)
    config = peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=BOTH)
    ours, tuned, theirs = twins(method, config, lambda layer: {"k": -layer.oft_R["default"].weight})
    x = net()[1]
    y, wanted = ours(x), theirs(x)
    close(y, wanted, 1e-10)
    y.sum().backward()
    wanted.sum().backward()
    for name, part in tuned.named_parts():
        close(part.k.grad, -layer(theirs, name).oft_R["default"].weight.grad, 1e-9)


def test_oft_is_leashed_as_there() -> None:
    method = dw.OFT(on=nn.Linear, block=4, eps=0.01)
    config = peft.OFTConfig(r=0, oft_block_size=4, coft=True, eps=0.01, target_modules=BOTH)
    _, tuned, theirs = twins(method, config, lambda layer: {"k": layer.oft_R["default"].weight})
    theirs(net()[1])
    rules = tuned.run(1)
    rules.emit("step_end")
    for name, part in tuned.named_parts():
        assert isinstance(part, BlockRotation)
        close(part.k, layer(theirs, name).oft_R["default"].weight, 1e-10)


def test_boft_with_one_stage() -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return {"p": layer.boft_R["default"], "s": layer.boft_s["default"].view(-1)}

    method = dw.BOFT(on=nn.Linear, block=4)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=BOTH)
    assert_equal(*twins(method, config, translate), translate)


def test_boft_with_more_stages_has_their_matrix() -> None:
    base = nn.Linear(16, 5)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    tuned = dw.attach(nn.Sequential(nn.Linear(16, 5)), dw.BOFT(on=nn.Linear, block=4, stages=3))
    (part,) = tuned.parts()
    with torch.no_grad():
        part.p.normal_()
    # Their stages by their own permutation and transform; without a compiled extension the layer itself takes one.
    matrix = torch.eye(16)
    for i in range(3):
        perm = theirs.perm2mat(theirs.block_butterfly_perm(16, 4 // 2**i, 2, 2))
        matrix = perm @ torch.block_diag(*theirs.cayley_batch(part.p[i])) @ perm.T @ matrix
    close(part.turned(torch.eye(16)), matrix, 1e-12)


def test_loha() -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return {own: getattr(layer, f"hada_w{own[1]}_{own[0]}")["default"] for own in ("a1", "b1", "a2", "b2")}

    method = dw.LoHa(on=nn.Linear, rank=3, alpha=6.0)
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=BOTH)
    assert_equal(*twins(method, config, translate), translate)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("factor", [-1, 2, 3, 5])
@pytest.mark.parametrize("rank", [1, 8])
def test_lokr(rank: int, factor: int, both: bool) -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        names = ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")
        return {
            own: getattr(layer, f"lokr_{own}")["default"] for own in names if "default" in getattr(layer, f"lokr_{own}")
        }

    method = dw.LoKr(on=nn.Linear, rank=rank, alpha=4.0, factor=factor, both=both)
    config = peft.LoKrConfig(r=rank, alpha=4, decompose_factor=factor, decompose_both=both, target_modules=BOTH)
    ours, tuned, theirs = twins(method, config, translate)
    for name, part in tuned.named_parts():
        assert dict(part.named_parameters()).keys() == translate(layer(theirs, name)).keys()
    assert_equal(ours, tuned, theirs, translate)
