"""VB-LoRA: one bank for all layers, mixtures of exactly k vectors, and files without logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.bank import BankFactors, ChosenFactors
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part, steps

SETTINGS = {"rank": 2, "vectors": 10, "length": 2}


def test_one_bank_receives_the_sum_of_all_layers_gradients() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.VBLoRA, **SETTINGS)
    banks = {part.bank.vectors for part in tuned.parts()}
    assert len(banks) == 1 and banks.pop().shape == (10, 2)
    bank = part(tuned).bank.vectors
    model(x).square().sum().backward()
    twin, _ = net(12, 8, 6)
    with torch.no_grad():
        for delta in tuned.parts():
            twin.get_submodule(delta.site.path).weight += delta.dense()
    twin(x).square().sum().backward()
    shares = []
    for delta in tuned.parts():
        full = twin.get_submodule(delta.site.path).weight.grad
        shares += torch.autograd.grad(delta.dense(), bank, full)
    assert all(share.abs().max() > 0 for share in shares)
    assert torch.allclose(sum(shares), bank.grad)


def test_the_start_is_small_and_not_zero() -> None:
    model, _ = net(12, 8, 6)
    for delta in attach(model, dw.VBLoRA, **SETTINGS).parts():
        assert 0 < delta.dense().abs().max() <= 2 * 0.02**2


def test_every_piece_depends_on_exactly_k_vectors() -> None:
    model, _ = net(12, 8, 6)
    delta = part(attach(model, dw.VBLoRA, **SETTINGS, top=3))
    a, _ = delta.factors()
    for piece in (a[0, :2], a[1, 4:6]):
        (gradient,) = torch.autograd.grad(piece.sum(), delta.bank.vectors, retain_graph=True)
        assert int((gradient.abs().sum(-1) > 0).sum()) == 3
    (gradient,) = torch.autograd.grad(a[0, :2].sum(), delta.a)
    assert int((gradient != 0).sum()) <= 3


def test_widths_that_the_length_does_not_divide_are_refused_and_defaults_fit_any() -> None:
    model, _ = net(12, 8, 6)
    with pytest.raises(ValueError, match=r"length=4 does not divide second of 6 x 8"):
        attach(model, dw.VBLoRA, length=4)
    tuned = attach(model, dw.VBLoRA, rank=2)
    assert [delta.length for delta in tuned.parts()] == [4, 2] and part(tuned).bank.length == 4


def test_logits_learn_ten_times_faster_than_the_bank() -> None:
    model, _ = net(12, 8, 6)
    groups = attach(model, dw.VBLoRA, **SETTINGS).parameter_groups(1e-3)
    rates = {name.rsplit(".")[-1]: group["lr"] for group in groups for name in group["names"]}
    assert rates == {"vectors": 1e-3, "a": pytest.approx(1e-2), "b": pytest.approx(1e-2)}


def test_after_training_indices_and_weights_alone_give_the_same_change(tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.VBLoRA, **SETTINGS)
    for _ in steps(model, x, tuned, 4):
        logits = [delta.dense().detach() for delta in tuned.parts()]
    for delta, before in zip(tuned.parts(), logits, strict=True):
        assert isinstance(delta, ChosenFactors) and torch.allclose(delta.dense(), before, atol=1e-12)
        assert delta.a_index.dtype == torch.uint8
    assert not tuned.parameters()
    expected = model(x)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = net(12, 8, 6)
    loaded = dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), expected) and not loaded.parameters()
    assert not any(name.endswith(("first.weight.a", "first.weight.b")) for name in loaded.tensors())


def test_the_stored_size_is_the_papers() -> None:
    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.VBLoRA(on="attention.query", rank=2, vectors=20, length=8), seed=0)
    run = tuned.run(1)
    run.emit("finished")
    pieces = 2 * 2 * (32 + 32) // 8
    # Two bytes of indices and one float32 weight a piece, and the bank once.
    assert tuned.summary().stored_bytes == 4 * 20 * 8 + pieces * (2 + 4)


def test_logits_stay_when_they_are_asked_for_and_experts_are_compacted_too() -> None:
    model, _ = net(12, 8, 6)
    tuned = attach(model, dw.VBLoRA, **SETTINGS, keep_logits=True)
    tuned.run(1).emit("finished")
    assert all(isinstance(delta, BankFactors) for delta in tuned.parts())
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.VBLoRA(on="experts"), seed=0)
    nudge(tuned)
    before = model(**batch).logits
    tuned.run(1).emit("finished")
    assert not tuned.parameters() and torch.allclose(model(**batch).logits, before, atol=1e-6)


def test_it_trains_every_layer() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.VBLoRA, **SETTINGS, keep_logits=True)
    before = {name: value.clone() for name, value in tuned.tensors().items()}
    list(steps(model, x, tuned, 3))
    assert all(not torch.equal(value, before[name]) for name, value in tuned.tensors().items())
    assert isinstance(model.first, nn.Linear)
