"""LoRA^2: low rank within low rank."""

from __future__ import annotations

import torch

import deltaworks as dw
from deltaworks.core.ranks import triplets
from tests.methods.toys import attach, net, nudge, part, steps

SETTINGS = {"width": 4, "init_rank": 3, "target_rank": 1, "t_init": 4, "t_final": 8, "alpha": 3.0}
STEPS = 24


def start(**settings):
    model, x = net(12, 8, 8)
    tuned = attach(model, dw.LoRASquared, **(SETTINGS | settings))
    return model, x, tuned, tuned.rules[0]


def test_the_change_is_the_product_of_five_and_of_low_rank() -> None:
    model, x, tuned, _ = start()
    weight, bias = model.first.weight.detach().clone(), model.first.bias
    with dw.disable(model):
        base = model(x)
    assert torch.equal(model(x), base)
    nudge(tuned)
    d = part(tuned)
    change = 3.0 / (3 + 1e-5) * d.left_out @ d.left @ torch.diag(d.e) @ d.right @ d.right_in
    assert torch.allclose(d.dense(), change)
    assert torch.allclose(model.first(x), x @ (weight + change).T + bias)
    with torch.no_grad():
        d.e[1] = 0
    assert torch.linalg.matrix_rank(d.dense()) == 2


def test_only_the_inner_factors_are_scored_and_the_budget_is_met() -> None:
    model, x, tuned, rule = start()
    last = None
    for step in steps(model, x, tuned, STEPS):
        assert {name.rsplit(".", 1)[1] for name in rule.sensitivity.smoothed} == {"p", "l", "q"}
        if step == STEPS:
            last = model(x).detach()
    assert sum(mean.numel() for mean, _ in rule.sensitivity.smoothed.values()) == 2 * (2 * 3 * 4 + 3)
    assert sum(len(l) for _, _, l, _ in triplets(tuned)) == 2
    assert torch.allclose(model(x), last)
    assert all(d.left_out.shape == (8, 4) for d in tuned.parts())


def test_the_penalty_has_both_terms() -> None:
    _, _, tuned, rule = start(gamma=0.5)

    def distance(f: torch.Tensor) -> torch.Tensor:
        thin = f if f.shape[0] <= f.shape[1] else f.T
        return (thin @ thin.T - torch.eye(len(thin))).norm()

    own = torch.stack([distance(f) for d in tuned.parts() for f in (d.left_out, d.left, d.right, d.right_in)]).mean()
    second = part(tuned, "second")  # the square one
    across = (second.right @ second.right_in @ second.left_out @ second.left).norm()
    assert torch.allclose(rule.penalty(tuned.run(STEPS).run), 0.5 * (own + across))


def test_what_else_trains_has_no_part_in_the_penalty() -> None:
    penalties = []
    for also in (None, "second"):
        model, _ = net(12, 8, 8)
        tuned = dw.attach(model, dw.LoRASquared(on="first", **SETTINGS), also=also, seed=0)
        penalties.append(tuned.rules[0].penalty(tuned.run(STEPS).run))
    assert torch.equal(*penalties)


def test_identities_inside_make_it_a_lora() -> None:
    _, _, tuned, _ = start(width=3)
    d = part(tuned)
    with torch.no_grad():
        d.e.fill_(1.0)
        d.left.copy_(torch.eye(3))
        d.right.copy_(torch.eye(3))
    assert torch.allclose(d.dense(), d.scale * d.left_out @ d.right_in)
