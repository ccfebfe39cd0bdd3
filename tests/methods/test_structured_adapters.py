"""KronA_B and SURM's adapters: structured matrices beside and after sub-layers."""

from __future__ import annotations

import functools

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.bottleneck import Tap
from deltaworks.core.operators.kronecker_branch import KroneckerBranch
from deltaworks.core.operators.structured_adapter import STRUCTURES, StructuredAdapter
from tests.conformance.subject import nudge
from tests.families import FAMILIES
from tests.methods.toys import saved_shapes


def attached(method, family: str = "llama"):
    model, batch = FAMILIES[family]()
    # As frozen as it will be: torch chooses products by what requires a gradient.
    base = model.requires_grad_(False)(**batch)[0]
    tuned = dw.attach(model, method, seed=0)
    assert torch.equal(model(**batch)[0], base)
    return model, batch, tuned


@pytest.mark.parametrize("residual", [False, True])
def test_a_branch_adds_the_kronecker_product_and_a_share_of_its_input(residual: bool) -> None:
    model, _, tuned = attached(dw.KronAB(scale=3.0, residual=residual))
    nudge(tuned, size=0.3)
    assert len(list(tuned.parts())) == 2
    for part in tuned.parts():
        assert isinstance(part, KroneckerBranch) and part.a.shape == (4, 8) and part.b.shape == (8, 4)
        assert sum(p.numel() for p in part.parameters()) == 64 + residual
        y, x = torch.randn(2, 3, 32), torch.randn(2, 3, 32, requires_grad=True)
        expected = y + 3.0 * x @ torch.kron(part.a, part.b).T
        if residual:
            expected = expected + part.s_res * x
        inputs = [x, *part.parameters()]
        g = torch.randn_like(y)
        assert torch.allclose(part.added(y, x), expected, atol=1e-5)
        theirs = torch.autograd.grad(expected, inputs, g)
        for ours, right in zip(torch.autograd.grad(part.added(y, x), inputs, g), theirs, strict=True):
            assert torch.allclose(ours, right, atol=1e-4)
        kept = saved_shapes(functools.partial(part.added, y, x))
        wide = [shape for shape in kept if shape == (2, 3, 32)]
        assert len(wide) <= 1 + residual, "only the input is kept"
    x = torch.randn(2, 3, 32)
    part = next(tuned.parts())
    with dw.disable(model):
        plain = model.model.layers[0].mlp(x)
    assert torch.allclose(model.model.layers[0].mlp(x), part.added(plain, x), atol=1e-5)
    with pytest.raises(ValueError, match="krona_b"):
        dw.merge(model)


@pytest.mark.parametrize("family", ["bert", "opt", "gpt2", "t5"])
def test_a_branch_reads_what_the_feed_forward_part_reads_also_where_it_spans_modules(family: str) -> None:
    model, batch, tuned = attached(dw.KronAB(), family)
    nudge(tuned, size=0.3)
    changed = model(**batch)[0]
    with dw.disable(model):
        assert not torch.allclose(model(**batch)[0], changed, atol=1e-4)
    changed.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters())
    assert any(isinstance(part, Tap) for part in tuned.parts()) == (family in ("bert", "opt"))


def test_the_sides_can_be_chosen() -> None:
    _, _, tuned = attached(dw.KronAB(rows=2, columns=16))
    assert next(tuned.parts()).a.shape == (2, 16) and next(tuned.parts()).b.shape == (16, 2)
    with pytest.raises(ValueError, match="rows=5 does not divide the 32 of model.layers.0"):
        attached(dw.KronAB(rows=5))


@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_adapter_is_its_matrix_a_non_linearity_and_a_bias(structure: str, activation: str) -> None:
    pairs = 3 if structure == "ldr" else 1
    # 12 is reduced to 4, the side that the scale counts with.
    own = {"rank": 12, "alpha": 8.0} if structure == "kronecker" else {"pairs": pairs, "scale": 1.5}
    method = dw.SURMAdapter(structure=structure, activation=activation, **own)
    model, _, tuned = attached(method)
    nudge(tuned, size=0.3)
    assert len(list(tuned.parts())) == 4
    for part in tuned.parts():
        assert isinstance(part, StructuredAdapter)
        matrix = part.matrix.dense()
        count = sum(p.numel() for p in part.parameters()) - 32
        if structure == "kronecker":
            assert count == 32 + 32
            assert torch.allclose(matrix, 2.0 * torch.kron(part.matrix.w1, part.matrix.w2))
        else:
            assert count == 2 * pairs * 32 and part.matrix.scale == 1.5
        assert torch.linalg.matrix_rank(matrix) >= 16, "as many values as a rank-one product, and yet a high rank"
        h = torch.randn(2, 3, 32)
        f = torch.nn.functional.gelu if activation == "gelu" else lambda z: z
        assert torch.allclose(part.output(h, h), h + f(h @ matrix.T) + part.bias, atol=1e-4)
    with pytest.raises(ValueError, match="surm_adp"):
        dw.merge(model)


def test_dropout_acts_on_the_added_path_alone() -> None:
    model, batch, tuned = attached(dw.SURMAdapter(dropout=0.5))
    nudge(tuned, size=0.3)
    model.train()
    first, second = model(**batch)[0], model(**batch)[0]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(**batch)[0], model(**batch)[0])
    with pytest.raises(ValueError, match="pairs=2 is for structure='ldr'"):
        dw.SURMAdapter(pairs=2)
    for name in ("rank", "alpha"):
        with pytest.raises(ValueError, match=f"surm_adp: {name}=4 is for structure='kronecker', not circulant"):
            dw.SURMAdapter(**{name: 4})
    with pytest.raises(ValueError, match="scale=1.5 is for structure='circulant' or .*, not kronecker"):
        dw.SURMAdapter(structure="kronecker", scale=1.5)


def test_all_blocks_have_one_branch() -> None:
    with pytest.raises(ValueError, match="krona_b is the same at all its places; it takes no overrides"):
        dw.KronAB(overrides={"mlp": {"scale": 2.0}})
