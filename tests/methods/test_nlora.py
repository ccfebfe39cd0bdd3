"""Structured LoRA, Nyström initialisation and the middle alone."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps


def test_slora_starts_unchanged_and_only_b_has_a_gradient() -> None:
    model, x = net()
    base = model(x)
    tuned = attach(model, dw.SLoRAStructured, rank=3)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    for name, p in tuned.named_parameters():
        assert (p.grad.abs().max() > 0) == name.endswith(".b")


def test_an_identity_in_the_middle_is_lora() -> None:
    outputs = []
    for method in (dw.SLoRAStructured, dw.LoRA):
        model, x = net()
        tuned = attach(model, method, rank=3, alpha=6.0)
        with torch.no_grad():
            for delta in tuned.parts():
                generator = torch.Generator().manual_seed(1)
                for p in (delta.a, delta.b):
                    p.copy_(torch.randn(p.shape, generator=generator))
                if method is dw.SLoRAStructured:
                    delta.n.copy_(torch.eye(3))
        outputs.append(model(x))
    assert torch.allclose(*outputs)


def test_factors_start_as_slices_of_the_weight() -> None:
    model, x = net(12, 8, 6)
    weight = model.first.weight.detach().clone()
    with dw.disable(model):
        base = model.first(x)
    tuned = attach(model, dw.NLoRA, rank=3, alpha=1.5)
    delta = part(tuned)
    assert (
        torch.equal(delta.a, weight[:3])
        and torch.equal(delta.b, weight[:, :3])
        and torch.equal(delta.n, weight[:3, :3])
    )
    moved = 0.5 * x @ (weight[:, :3] @ weight[:3, :3] @ weight[:3]).T
    assert torch.allclose(model.first(x) - base, moved)
    nudge(tuned)
    assert torch.equal(model.first.weight, weight), "the factors are copies, not views of the base"


@pytest.mark.parametrize("nystrom", ["raw", "pinv"])
def test_the_start_can_be_subtracted(nystrom: str) -> None:
    model, x = net()
    base = model(x)
    tuned = attach(model, dw.NLoRA, rank=3, nystrom=nystrom, subtract_init=True)
    assert torch.allclose(model(x), base)
    nudge(tuned)
    assert torch.linalg.matrix_rank(part(tuned).dense()) <= 6


def test_the_pseudo_inverse_is_the_nystroem_approximation() -> None:
    model, _ = net(12, 8, 6)
    with torch.no_grad():
        model.first.weight.copy_(torch.randn(8, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64))
    delta = part(attach(model, dw.NLoRA, rank=3, nystrom="pinv"))
    assert torch.allclose(delta.dense(), model.first.weight)


@pytest.mark.parametrize("method", [dw.SLoRAStructured, dw.NLoRA, dw.IntTune])
def test_gradients_are_the_derivatives(method: type) -> None:
    model, x = net(5, 4, 6)
    tuned = attach(model, method, rank=2, dropout=0.5)
    nudge(tuned)
    model.train()

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model(inputs[0])

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *tuned.parameters()))


def test_the_middle_alone_is_all_that_trains_and_all_that_is_stored(tmp_path) -> None:
    model, x = net(12, 8, 6)
    weight = model.first.weight.detach().clone()
    tuned = attach(model, dw.IntTune, rank=3)
    list(steps(model, x, tuned, 3))
    assert sum(t.numel() for t in tuned.tensors().values()) == 2 * 9
    assert torch.equal(model.first.weight, weight)
    expected = weight + weight[:, :3] @ part(tuned).n @ weight[:3]
    assert torch.allclose(model.first(x), x @ expected.T + model.first.bias)
    dw.save(model, tmp_path / "adapter")
    twin, _ = net(12, 8, 6)
    dw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(x), model(x))


def test_the_middle_alone_keeps_nothing_as_wide_as_the_input() -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.IntTune, rank=3)
    x.requires_grad_()
    kept = [shape for shape in saved_shapes(lambda: model.first(x)) if shape[0] in (2, 10)]
    assert kept == [(10, 3)]


def test_a_rank_above_the_smaller_side_is_that_side() -> None:
    model, _ = net(12, 8, 6)
    assert [delta.n.shape for delta in attach(model, dw.IntTune).parts()] == [(8, 8), (6, 6)]
