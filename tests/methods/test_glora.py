"""GLoRA: every configuration starts at the base and merges; the search keeps its budget and repeats itself."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.evolution import Sizes, evolve
from deltaworks.core.operators.general import BIAS_TERMS, WEIGHT_TERMS
from deltaworks.core.supernet import search
from tests.methods.toys import attach, net, nudge, part, steps

TERMS = {**WEIGHT_TERMS, **BIAS_TERMS}
ALL = [dict(zip(TERMS, kinds, strict=True)) for kinds in itertools.product(*TERMS.values())]
NONE = dict.fromkeys(TERMS, "none")


def bare() -> tuple[nn.Sequential, torch.Tensor]:
    """Layers of which one has no bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).double()
    return model, torch.randn(3, 6, dtype=torch.float64)


def test_there_are_432_and_each_starts_at_the_base_and_equals_its_merge() -> None:
    assert len(ALL) == 432
    model, x = bare()
    base = model(x).detach()
    for kinds in ALL:
        if kinds == NONE:
            continue
        tuned = dw.attach(model, dw.GLoRA(on=nn.Linear, rank=2, **kinds), seed=0)
        assert torch.allclose(model(x), base, atol=1e-14), kinds
        nudge(tuned, 0.3)
        beside = model(x).detach()
        dw.merge(model)
        assert torch.allclose(model(x), beside, atol=1e-12), kinds
        dw.detach(model)
        assert torch.equal(model(x), base)
    with pytest.raises(ValueError, match="nothing to change"):
        dw.attach(model, dw.GLoRA(on=nn.Linear, **NONE))


def test_the_change_is_the_papers() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.GLoRA, rank=2)
    nudge(tuned, 0.3)
    parts = dict(tuned.named_parts())
    terms, bias, layer = parts["first.weight"], parts["first.bias"], model.first
    weight = layer.weight * (1 + terms.ad @ terms.au) + terms.bd @ terms.bu
    shift = layer.bias * (1 + bias.dd[:, 0]) + bias.ed[:, 0] + (layer.weight @ bias.cd @ bias.cu)[:, 0]
    assert torch.allclose(layer(x), x @ weight.T + shift)
    count = 2 * 2 * (12 + 8) + 2 * (12 + 1) + 2 * 8
    assert sum(p.numel() for name, p in tuned.named_parameters() if name.startswith("first")) == count


def test_a_constant_scales_the_weight() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.GLoRA, **(NONE | {"a": "constant"}))
    with torch.no_grad():
        part(tuned).ad.fill_(0.25)
    assert torch.allclose(model.first(x), 1.25 * x @ model.first.weight.T + model.first.bias)


def test_a_missing_bias_is_made_and_has_nothing_to_scale() -> None:
    model, x = bare()
    tuned = dw.attach(model, dw.GLoRA(on=nn.Linear), seed=0)
    made = dict(tuned.named_parts())["2.bias"]
    assert made.kinds["d"] == "none" and made.dd is None
    with torch.no_grad():
        made.ed.fill_(0.5)
    assert torch.allclose(model[2](model[1](model[0](x))), model(x))
    dw.bake(model)
    assert torch.allclose(model[2].bias, torch.full((4,), 0.5).double())


def test_a_copy_and_a_file_read_their_own_layers_weight(tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.GLoRA, rank=2)
    nudge(tuned, 0.3)
    twin = copy.deepcopy(model)
    dw.save(model, tmp_path / "adapter")
    expected = model(x)
    with torch.no_grad():
        model.first.weight.zero_()
    assert torch.equal(twin(x), expected)
    fresh, _ = net(12, 8, 6)
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), expected)


def supernet() -> tuple[nn.Module, torch.Tensor, dw.Tuned]:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.GLoRA, rank=2, supernet=True)
    nudge(tuned, 0.3)
    return model, x, tuned


def test_a_supernet_draws_in_training_and_stands_still_in_evaluation() -> None:
    model, x, tuned = supernet()
    model.train()
    assert len({float(model(x).sum()) for _ in range(8)}) > 4
    model.eval()
    assert len({float(model(x).sum()) for _ in range(4)}) == 1
    model.train()
    totals = {name: torch.zeros_like(p) for name, p in tuned.named_parameters()}
    for _ in range(20):
        model.zero_grad()
        outputs = [model(x), model(2 * x)]  # two passes before one backward: each keeps what it drew
        sum(y.square().sum() for y in outputs).backward()
        for name, p in tuned.named_parameters():
            totals[name] += 0 if p.grad is None else p.grad.abs()
    assert all(total.abs().sum() > 0 for total in totals.values())


def find(budget: int, seed: int = 0):
    model, x, tuned = supernet()
    target = net(12, 8, 6, seed=1)[0](x).detach()
    sizes = Sizes(generations=5, population=12, keep=4, mutations=6, crossovers=6)
    found = search(tuned, lambda: -float((model(x) - target).square().sum()), budget=budget, sizes=sizes, seed=seed)
    return model, x, tuned, found, -float((model(x) - target).square().sum())


def test_the_search_keeps_the_budget_and_drops_what_is_not_chosen() -> None:
    model, x, tuned, found, score = find(60)
    assert found.parameters <= 60 and found.score == pytest.approx(score)
    assert found.history == sorted(found.history)
    # A term of kind vector keeps its first column, and nothing more is held.
    assert sum(p.numel() for p in tuned.parameters()) == found.parameters
    assert not any(part.searching for part in tuned.parts())
    dw.merge(model)
    assert torch.allclose(model(x), dw.unmerge(model)(x))


def test_the_same_seed_is_the_same_search() -> None:
    found = [find(60, seed)[3] for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0].kinds != found[2].kinds


def test_evolution_finds_the_best_within_a_budget_and_scores_nothing_twice() -> None:
    costs = [{"none": 0, "small": 1, "large": 5}] * 6
    worth = {"none": 0, "small": 2, "large": 3}
    seen = []

    def score(genome: tuple[str, ...]) -> float:
        seen.append(genome)
        assert sum(cost[kind] for cost, kind in zip(costs, genome, strict=True)) <= 10
        return sum(worth[kind] for kind in genome)

    best, history = evolve(costs, score, 10, Sizes(), seed=0)
    assert len(set(seen)) == len(seen) and history == sorted(history)
    assert sorted(best) == ["large", "small", "small", "small", "small", "small"]


def test_without_a_supernet_there_is_nothing_to_search() -> None:
    tuned = attach(net()[0], dw.GLoRA)
    with pytest.raises(ValueError, match="supernet=True"):
        search(tuned, lambda: 0.0)


def test_a_supernet_holds_and_charges_no_d_where_there_is_no_bias() -> None:
    model, _ = bare()
    tuned = dw.attach(model, dw.GLoRA(on=nn.Linear, rank=2, supernet=True), seed=0)
    counts = [sum(p.numel() for name, p in tuned.named_parameters() if name.startswith(path)) for path in "02"]
    assert counts == [2 * 2 * (6 + 5) + 2 * (6 + 1) + 2 * 5, 2 * 2 * (5 + 4) + 2 * (5 + 1) + 4]
    made = dict(tuned.named_parts())["2.bias"].train()
    assert {made.drawn()["d"] for _ in range(20)} == {"none"} < {made.drawn()["e"] for _ in range(20)}
    found = search(tuned, lambda: 0.0, sizes=Sizes(generations=1, population=20))
    assert found.kinds["2.bias"]["d"] == "none"
    assert sum(p.numel() for p in tuned.parameters()) == found.parameters


def test_a_configuration_that_is_set_stays_through_training(tmp_path) -> None:
    model, x, tuned = supernet()
    kinds = {"a": "vector", "b": "none", "c": "lora", "d": "none", "e": "constant"}
    for one in tuned.parts():
        one.configure({term: kinds[term] for term in one.choices})
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    for _ in steps(model.train(), x, tuned, 3):
        assert torch.equal(model(x), model(x))
    moved = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"ad", "cd", "cu", "ed"} and len(moved) == 8
    dw.save(model, tmp_path / "adapter")
    twin, _ = net(12, 8, 6)
    loaded = dw.load(twin, tmp_path / "adapter")
    twin.train()
    assert torch.equal(twin(x), model(x))
    for one in loaded.parts():
        one.fixed = False
    assert len({float(twin(x).sum()) for _ in range(8)}) > 4


def test_a_search_that_keeps_the_supernet_leaves_it_set() -> None:
    model, x, tuned = supernet()
    search(tuned, lambda: 0.0, sizes=Sizes(generations=1, population=4), settle=False)
    model.train()
    assert len({float(model(x).sum()) for _ in range(8)}) == 1 and all(one.searching for one in tuned.parts())
