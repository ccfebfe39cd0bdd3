"""AFLoRA: factors freeze by score until only vectors train, and what is frozen costs nothing."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.methods.lowrank.aflora import matrices
from tests.methods.toys import attach, net, part, saved_shapes

SETTINGS = {"rank": 3, "interval": 2, "t_init": 4, "t_final": 10}


def run(count: int = 20, sizes=(12, 8, 6), **settings):
    """Yields the model, the handle and the optimizer after every step."""
    model, x = net(*sizes)
    tuned = attach(model, dw.AFLoRA, **(SETTINGS | settings))
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.02), weight_decay=0.1)
    rules = tuned.run(count, optimizer=optimizer)
    rules.emit("attached")
    for step in range(1, count + 1):
        optimizer.zero_grad()
        rules.emit("step_begin")
        (model(x) - target).square().mean().backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        yield step, tuned, optimizer, rules


def test_the_start_is_the_base_and_square_layers_train_their_vectors_alone() -> None:
    model, x = net(8, 8, 6)
    base = model(x)
    tuned = attach(model, dw.AFLoRA, **SETTINGS)
    assert torch.equal(model(x), base)
    names = [name for name, _ in tuned.named_parameters() if name.startswith("first")]
    assert names == ["first.weight.d", "first.weight.u"]
    before = part(tuned).a.clone()
    for _ in run(sizes=(8, 8, 6)):
        pass
    assert torch.equal(part(tuned).a, before)
    assert len(attach(net(8, 8, 6)[0], dw.AFLoRA, **SETTINGS, factors="all").parameters()) == 8


def test_matrices_freeze_for_good_and_all_before_the_last_phase() -> None:
    counts, values, vectors = [], {}, {}
    for step, tuned, optimizer, _ in run():
        live = [name for name, matrix in matrices(tuned) if matrix.requires_grad]
        counts.append(len(live))
        for name, matrix in matrices(tuned):
            if name not in live:
                assert matrix not in optimizer.state and matrix.grad is None
                assert torch.equal(values.setdefault(name, matrix.clone()), matrix)
        if step > 11:
            now = {name: p.clone() for name, p in tuned.named_parameters()}
            assert all(name.endswith((".d", ".u")) for name in now)
            assert all(not torch.equal(p, vectors[name]) for name, p in now.items() if name in vectors)
            vectors = now
    assert counts[:4] == [4] * 4 and counts[10:] == [0] * 10
    assert counts == sorted(counts, reverse=True)


def test_they_freeze_one_after_the_other() -> None:
    counts = []
    for _, tuned, _, _ in run(30, interval=1, t_init=2, t_final=4):
        counts.append(sum(matrix.requires_grad for _, matrix in matrices(tuned)))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 2


def test_the_share_kept_is_a_cubic() -> None:
    _, _, _, rules = next(run())
    rule, whole = rules.rules[0], rules.run
    assert [rule.keep(t, whole) for t in (1, 4, 11)] == [1.0, 1.0, 0.0]
    assert rule.keep(6, whole) == pytest.approx((2 / 3) ** 3) and rule.keep(8, whole) == pytest.approx((1 / 3) ** 3)


def test_a_frozen_a_lets_the_input_go_and_the_trained_count_is_recorded() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.AFLoRA, **SETTINGS)
    model.train()
    assert any(shape[-1] == 12 for shape in saved_shapes(lambda: model.first(x)))
    part(tuned).a.requires_grad_(False)
    assert not any(shape[-1] == 12 for shape in saved_shapes(lambda: model.first(x)))
    (*_, (_, _, _, rules)) = run()
    counts = [value for _, value in rules.run.history["aflora.trained"]]
    assert counts[0] == 3 * (12 + 8 + 8 + 6) + 2 * 3 + 8 + 6 and counts[-1] == 2 * 3 + 8 + 6


def test_the_score_is_of_the_gradients_size_and_a_short_run_is_refused() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.AFLoRA, **(SETTINGS | {"interval": 1}))
    rules = tuned.run(20)
    rules.emit("attached")
    model(x).square().sum().backward()
    rules.emit("gradients")
    name, matrix = next(matrices(tuned))
    mean, spread = rules.rules[0].sensitivity.smoothed[name]
    assert torch.allclose(mean, 0.15 * matrix.grad.abs())
    assert torch.allclose(spread, 0.05 * 0.85 * matrix.grad.abs())
    with pytest.raises(ValueError, match="below the run's 14"):
        tuned.run(14).emit("attached")


def test_the_mean_of_the_trained_counts_is_the_average_over_the_run() -> None:
    sizes, counts = [], []
    for _, tuned, _, rules in run():
        live = [matrix.numel() for _, matrix in matrices(tuned) if matrix.requires_grad]
        sizes.append(sum(live) + 2 * 3 + 8 + 6)
        counts = [value for _, value in rules.run.history["aflora.trained"]]
    assert sum(counts) / len(counts) == sum(sizes) / 20 and sizes[0] > sizes[-1] == sizes[-9]
