"""LoRA-SP: a random half never moves, and neither gradients nor optimizer nor file know of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps

NO_DROPOUT = {"dropout": 0.0}


def whole(tuned: dw.Tuned) -> list[torch.Tensor]:
    return [factor.detach().clone() for delta in tuned.parts() for factor in delta.factors()]


@pytest.mark.parametrize("grain", ["element", "component"])
def test_exactly_half_stays_the_same_bits_through_training_with_decay(grain: str) -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.LoRASP, rank=4, grain=grain, **NO_DROPOUT)
    assert torch.equal(model(x), base)
    before = whole(tuned)
    list(steps(model, x, tuned, 20, decay=0.1))
    for was, now in zip(before, whole(tuned), strict=True):
        same = was == now
        assert int(same.sum()) == was.numel() // 2 or (grain == "component" and int(same.sum()) >= was.numel() // 2)
        if grain == "component":
            lines = same.all(1) if was.shape[0] == 4 else same.all(0)
            assert int(lines.sum()) >= 2
    assert all((factor == 0).float().mean() >= 0.5 for factor in whole(tuned)[1::2])


def test_a_whole_factor_by_the_throw_of_a_coin_leaves_no_layer_dead() -> None:
    seen = set()
    for seed in range(6):
        model, x = net(12, 8, 6)
        tuned = attach(model, dw.LoRASP, rank=4, grain="matrix", seed=0, **NO_DROPOUT)
        dw.detach(model)
        tuned = dw.attach(model, dw.LoRASP(on="first", rank=4, grain="matrix", seed=seed, dropout=0.0))
        before = part(tuned).dense().detach()
        assert before.abs().max() == 0
        (trained,) = tuned.parameters()
        seen.add(trained.numel())
        list(steps(model, x, tuned, 3))
        assert part(tuned).dense().abs().max() > 0
    assert seen == {4 * 12, 4 * 8}


def test_a_fixed_a_lets_the_input_go() -> None:
    for seed in range(10):
        model, x = net(12, 8, 6)
        delta = next(dw.attach(model, dw.LoRASP(on="first", rank=4, grain="matrix", seed=seed, dropout=0.0)).parts())
        if delta.a is None:
            model.train()
            assert not any(s in ((10, 12), (2, 5, 12)) for s in saved_shapes(lambda model=model, x=x: model.first(x)))
            return
    raise AssertionError("no coin fell on A")


def test_gradients_and_optimizer_state_are_half_of_loras() -> None:
    sizes = {}
    for method in (dw.LoRASP, dw.LoRA):
        model, x = net(12, 8, 6)
        tuned = attach(model, method, rank=4, **NO_DROPOUT)
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01))
        model(x).square().sum().backward()
        optimizer.step()
        state = sum(t.numel() for one in optimizer.state.values() for t in one.values() if t.dim())
        sizes[method] = (state, sum(p.grad.numel() for p in tuned.parameters()))
    assert sizes[dw.LoRASP] == tuple(size / 2 for size in sizes[dw.LoRA])


def test_the_choice_is_the_seeds_and_every_layers_own() -> None:
    def indices(seed: int) -> list[torch.Tensor]:
        tuned = dw.attach(net(8, 8, 8)[0], dw.LoRASP(on=nn.Linear, rank=4, seed=seed))
        return [delta.a_index for delta in tuned.parts()]

    first, second = indices(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, indices(0)[0]) and not torch.equal(first, indices(1)[0])


def test_a_file_holds_the_trained_entries_alone_and_gives_the_change_back(tmp_path) -> None:
    model, _ = net(12, 8, 6)
    tuned = attach(model, dw.LoRASP, rank=4)
    nudge(tuned)
    expected, stored = whole(tuned), sum(t.numel() for t in tuned.tensors().values())
    assert stored == 4 * (12 + 8 + 8 + 6) // 2
    dw.save(model, tmp_path / "adapter")
    fresh, _ = net(12, 8, 6)
    loaded = dw.load(fresh, tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(whole(loaded), expected, strict=True))
