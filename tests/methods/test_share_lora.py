"""ShareLoRA: layers of one kind train the same factor."""

from __future__ import annotations

import copy

import pytest
import torch

import deltaworks as dw
from tests.families import FAMILIES
from tests.methods.toys import nudge

ATTENTION = ["attention.query", "attention.key", "attention.value"]


def start(on="attention.query", **settings):
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.ShareLoRA(on=on, rank=4, **settings), seed=0)
    return model, batch, tuned


def factors(tuned: dw.Tuned) -> list[tuple]:
    return [delta.factors() for delta in tuned.parts()]


@pytest.mark.parametrize("share", ["a", "b", "ab", "qkv"])
def test_the_start_is_the_base(share: str) -> None:
    model, batch, tuned = start(on=ATTENTION, share=share)
    with dw.disable(model):
        base = model(**batch).logits
    assert torch.equal(model(**batch).logits, base)
    nudge(tuned)
    assert not torch.allclose(model(**batch).logits, base)


@pytest.mark.parametrize(("share", "same"), [("a", (True, False)), ("b", (False, True)), ("ab", (True, True))])
def test_the_shared_factor_is_one_tensor_wherever_the_model_goes(share: str, same: tuple, tmp_path) -> None:
    model, batch, tuned = start(share=share)
    nudge(tuned)
    dw.save(model, tmp_path / "adapter")
    loaded = dw.load(FAMILIES["llama"]()[0], tmp_path / "adapter")
    for handle in (tuned, dw.tuned(copy.deepcopy(model)), loaded, dw.tuned(copy.deepcopy(model).double())):
        (a0, b0), (a1, b1) = factors(handle)
        assert (a0 is a1, b0 is b1) == same
    assert torch.equal(loaded.model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("share", "size"), [("a", 4 * 32 + 2 * 4 * 32), ("b", 4 * 32 + 2 * 4 * 32), ("ab", 4 * 64)])
def test_the_optimizer_sees_every_shared_tensor_once(share: str, size: int) -> None:
    _, _, tuned = start(share=share)
    assert sum(p.numel() for p in tuned.parameters()) == size
    grouped = [p for group in tuned.parameter_groups(1e-3) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(tuned.parameters())


def test_the_shared_gradient_is_the_sum_over_layers() -> None:
    model, batch, tuned = start()
    nudge(tuned)
    model(**batch).loss.backward()
    untied, _ = FAMILIES["llama"]()
    own = dw.attach(untied, dw.LoRA(on="attention.query", rank=4), seed=0)
    with torch.no_grad():
        for mine, theirs in zip(own.parts(), factors(tuned), strict=True):
            mine.a.copy_(theirs[0])
            mine.b.copy_(theirs[1])
    untied(**batch).loss.backward()
    assert torch.allclose(factors(tuned)[0][0].grad, sum(delta.a.grad for delta in own.parts()), atol=1e-7)
    for mine, theirs in zip(own.parts(), factors(tuned), strict=True):
        assert torch.allclose(mine.b.grad, theirs[1].grad, atol=1e-7)


def test_sharing_both_is_the_same_change_in_every_layer() -> None:
    _, _, tuned = start(share="ab")
    nudge(tuned)
    first, second = tuned.parts()
    assert torch.equal(first.dense(), second.dense())


def test_kinds_and_shapes_are_groups_of_their_own() -> None:
    _, _, tuned = start(on=["attention.query", "attention.value", "mlp.down"])
    groups = {}
    for name, delta in tuned.named_parts():
        groups.setdefault(id(delta.factors()[0]), set()).add(name.split(".")[-2])
    assert sorted(map(sorted, groups.values())) == [["down_proj"], ["q_proj"], ["v_proj"]]


def test_queries_keys_and_values_can_share_one_projection() -> None:
    _, _, tuned = start(on=[*ATTENTION, "mlp.down"], share="qkv")
    projections = {name.split(".")[-2]: id(delta.factors()[0]) for name, delta in tuned.named_parts()}
    assert projections["q_proj"] == projections["k_proj"] == projections["v_proj"] != projections["down_proj"]
    assert len({id(delta.factors()[1]) for delta in tuned.parts()}) == 8


def test_one_projection_for_all_attentions_counts_once() -> None:
    """`r d_in`, and `r d_out` for every layer's B; keys and values are half as wide as queries here."""
    _, _, tuned = start(on=ATTENTION, share="qkv")
    assert sum(p.numel() for p in tuned.parameters()) == 4 * 32 + 2 * 4 * (32 + 16 + 16)


def test_fused_projections_are_told_apart() -> None:
    model, _ = FAMILIES["gpt2"]()
    tuned = dw.attach(model, dw.ShareLoRA(on=["attention.query", "attention.value"], rank=4), seed=0)
    assert len({id(delta.factors()[0]) for delta in tuned.parts()}) == 2
