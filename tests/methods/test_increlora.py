"""IncreLoRA: terms are added where the change matters."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.growing import Growing
from deltaworks.core.operators.triplet import Triplet, orthogonality
from tests.families import FAMILIES
from tests.methods.resuming import trained
from tests.methods.toys import attach, net, nudge, steps

SETTINGS = {"target_rank": 4, "grow": 2, "top": 1, "warmup": 2, "interval": 3, "rise": 4}
STEPS = 24


def start(**settings):
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.IncreLoRA, **(SETTINGS | settings))
    return model, x, tuned, tuned.rules[0]


def ranks(tuned: dw.Tuned) -> list[int]:
    return [part.l.shape[-1] for _, part in tuned.of_kind(Growing)]


def test_nothing_changes_at_the_start_and_the_count_is_the_formula() -> None:
    model, x, tuned, _ = start()
    with dw.disable(model):
        base = model(x)
    # The reserve's constant weight is tiny but not nothing, as in the paper.
    assert torch.allclose(model(x), base, atol=1e-6) and not torch.equal(model(x), base)
    sizes = [12 + 8, 8 + 6]
    assert sum(p.numel() for p in tuned.parameters()) == sum(s + 1 + 2 * s for s in sizes)
    model, x, tuned, _ = start(advance=False)
    with dw.disable(model):
        base = model(x)
    assert torch.equal(model(x), base)
    assert sum(p.numel() for p in tuned.parameters()) == sum(s + 1 for s in sizes)


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("settings", [{}, {"grow": 4, "target_rank": 4, "top": 2}, {"target_rank": 3, "top": 5}])
def test_ranks_rise_by_at_most_a_growth_and_end_at_the_target(advance: bool, settings: dict) -> None:
    model, x, tuned, rule = start(advance=advance, **settings)
    before, method = 2, rule.method
    for step in steps(model, x, tuned, STEPS):
        now = sum(ranks(tuned))
        assert now - before <= method.top * method.step
        assert now == before or ((step - 1) % 3 == 0 and step - 1 > 2)
        before = now
    assert before == 2 * method.target_rank
    assert all(isinstance(part, Triplet) for part in tuned.parts())
    assert sum(part.rank for part in tuned.parts()) == before


def test_layers_that_matter_more_end_with_more() -> None:
    model, x, tuned, _ = start(target_rank=5, top=1)
    with torch.no_grad():
        model.second.weight.mul_(1e-3)  # what the first layer does hardly reaches the output
    list(steps(model, x, tuned, 2 * STEPS))
    first, second = (part.rank for part in tuned.parts())
    assert first + second == 10 and first < second


def test_the_score_is_the_smoothed_sum_of_change_times_gradient() -> None:
    for fold in (False, True):
        model, x, tuned, rule = start(beta1=0.5, beta2=0.25)
        nudge(tuned)
        expected = {}
        for name, part in tuned.named_parts():
            layer = model.get_submodule(name.partition(".")[0])
            layer.weight.requires_grad_(True)  # under a trained weight the change enters by the weight itself
            if not fold:
                part.prefers_side = lambda *_: True
        model(x).square().mean().backward()
        for name, part in tuned.named_parts():
            weight = model.get_submodule(name.partition(".")[0]).weight
            expected[name] = float((part.dense().detach() * weight.grad).abs().sum() / math.sqrt(weight.numel()))
            weight.requires_grad_(False)
            if fold:
                part.prefers_side = lambda *_: False
        rules = tuned.run(STEPS, optimizer=torch.optim.SGD(tuned.parameters(), lr=0.0))
        rules.emit("attached")
        rules.emit("step_begin")
        model(x).square().mean().backward()
        rules.emit("gradients")
        rules.emit("step_end")
        for name, score in expected.items():
            mean, spread = rule.importance.smoothed[name]
            assert mean == pytest.approx(0.5 * score) and spread == pytest.approx(0.75 * 0.5 * score)
            assert dict(tuned.named_parts())[name].watch is None


def test_the_score_sees_embeddings_convolutions_and_parts_of_fused_weights() -> None:
    for family, on in (("llama", "embedding"), ("gpt2", "all"), ("mixtral", "all"), ("mamba", "all")):
        model, batch = FAMILIES[family]()
        tuned = dw.attach(model, dw.IncreLoRA(on=on), seed=0)
        nudge(tuned)
        rules = tuned.run(10, optimizer=torch.optim.SGD(tuned.parameters(), lr=0.0))
        rules.emit("attached")
        rules.emit("step_begin")
        model(**batch)[0].float().square().mean().backward()
        rules.emit("gradients")
        rules.emit("step_end")
        assert all(mean > 0 for mean, _ in tuned.rules[0].importance.smoothed.values()), family


def test_new_terms_keep_still_at_first_and_then_move_like_a_group_of_their_own() -> None:
    model, x, tuned, rule = start(gamma=0.0)
    run = tuned.run(STEPS).run
    assert [rule.rate(run, 5, step) for step in (5, 6, 9)] == [0.0, 0.25, 1.0]
    assert rule.rate(run, 5, 24) == 0.0 and rule.rate(run, 5, 15) == pytest.approx(9 / 15)
    births, held = {}, {}
    for step in steps(model, x, tuned, STEPS):
        for name, parameter, dim in rule.newcomers.tensors(dict(tuned.of_kind(Growing))):
            for index, birth in enumerate(rule.newcomers.births[name]):
                value = parameter.detach().select(dim, index).clone()
                if birth == step - 1 and birth:
                    assert torch.equal(value, held[name, index]), "the first step is made at rate 0"
                if birth and birth < step - 2:
                    assert not torch.equal(value, held[name, index])
                held[name, index] = value
                births[name] = birth
    assert any(births.values())


def test_a_newcomer_moves_as_under_an_optimizer_of_its_own() -> None:
    from deltaworks.core.newcomers import Newcomers

    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([whole], lr=0.1, weight_decay=0.0, eps=0.0)
    newcomers, gradients = Newcomers({"w": 0}), torch.randn(9, 3, 3, dtype=torch.float64)
    part = torch.nn.ParameterDict({"w": whole})
    newcomers.know({"part": part})
    alone = torch.nn.Parameter(torch.randn(1, 3, dtype=torch.float64))
    twin = torch.optim.AdamW([alone], lr=0.1, weight_decay=0.0, eps=0.0)
    for step in range(9):
        if step == 4:
            newcomers.grow("part", part, {"w": alone.detach()}, 4, optimizer)
        whole.grad = gradients[step][: len(whole)]
        newcomers.hold({"part": part})
        optimizer.step()
        newcomers.pace({"part": part}, optimizer, step, lambda birth, now: (now - birth + 1) / 5)
        if step >= 4:
            twin.param_groups[0]["lr"] = 0.1 * (step - 4 + 1) / 5
            alone.grad = gradients[step][2:]
            twin.step()
            assert torch.allclose(whole[2:], alone)


def test_the_reserve_is_constant_until_used_and_gone_in_the_end() -> None:
    model, x, tuned, _ = start()
    for step in steps(model, x, tuned, STEPS):
        for _, part in tuned.of_kind(Growing):
            met = sum(ranks(tuned)) == 8
            assert part.reserve.tolist() == ([] if met else pytest.approx([1e-5, 1e-5]))
            assert part.rank == part.l.numel() + len(part.reserve)
        if step == STEPS:
            last = model(x).detach()
    assert torch.allclose(model(x), last)


def test_survivors_keep_their_optimizer_state_when_a_layer_grows() -> None:
    model, x, tuned, rule = start()
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.05))
    rules = tuned.run(STEPS, optimizer=optimizer)
    rules.emit("attached")
    for _ in range(4):
        optimizer.zero_grad()
        rules.emit("step_begin")
        model(x).square().mean().backward()
        rules.emit("gradients")
        optimizer.step()
        before = {p: optimizer.state[p]["exp_avg"].clone() for p in tuned.parameters()}
        sizes = ranks(tuned)
        rules.emit("step_end")
    assert ranks(tuned) != sizes, "the last step let a layer grow"
    for _, parameter, dim in rule.newcomers.tensors(dict(tuned.of_kind(Growing))):
        state, old = optimizer.state[parameter]["exp_avg"], before[parameter]
        assert state.shape == parameter.shape
        assert torch.equal(state.narrow(dim, 0, old.shape[dim]), old)
        assert not state.narrow(dim, old.shape[dim], state.shape[dim] - old.shape[dim]).any()


def test_the_penalty_covers_reserves() -> None:
    _, _, tuned, rule = start(gamma=0.3)
    pairs = [(part.p, part.q) for part in tuned.parts()]
    assert torch.allclose(rule.penalty(tuned.run(STEPS).run), 0.3 * orthogonality(pairs))
    assert all(part.p.shape[1] == 3 for part in tuned.parts() if isinstance(part, Growing))


@pytest.mark.parametrize(("family", "stops"), [("llama", (1, 4, 5, 8, 13)), ("mixtral", (8,))])
def test_it_resumes_at_any_step_bit_for_bit(family: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    method = dw.IncreLoRA(**(SETTINGS | {"top": 6}))
    whole, history, _ = trained(method, tmp_path, family)
    assert len({count for _, counts in history["ranks"] for count in counts.values()}) > 1
    for stop in stops:
        resumed, again, _ = trained(method, tmp_path, family, stop=stop)
        assert list(whole) == list(resumed) and history == again, stop
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), stop


def test_a_copy_of_a_growing_model_grows_by_itself() -> None:
    model, x, tuned, _ = start()
    for step in steps(model, x, tuned, STEPS):
        if step == 8:
            twin = copy.deepcopy(model)
            expected = model(x).detach()
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)


def test_ranks_cannot_be_asked_to_fall() -> None:
    with pytest.raises(ValueError, match="init_rank=2 is above target_rank=1; ranks only grow"):
        dw.IncreLoRA(init_rank=2, target_rank=1)


def test_the_score_under_autocast_is_that_without() -> None:
    scores = []
    for autocast in (False, True):
        model, x, tuned, rule = start()
        model.float()
        nudge(tuned)
        for delta in tuned.parts():
            delta.prefers_side = lambda *_: True
        rules = tuned.run(STEPS, optimizer=torch.optim.SGD(tuned.parameters(), lr=0.1))
        rules.emit("attached")
        rules.emit("step_begin")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x.float()).square().mean()
        loss.backward()
        rules.emit("gradients")
        rules.run.optimizer.step()
        rules.emit("step_end")
        scores.append([mean for mean, _ in rule.importance.smoothed.values()])
    assert min(scores[0]) > 0 and scores[1] == pytest.approx(scores[0], rel=0.05)


@pytest.mark.parametrize("settings", [{"warmup": STEPS}, {"interval": STEPS}])
def test_a_run_that_ends_before_a_layer_could_grow_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="increlora: layers first grow after step 2[58], the run has 24; shorten"):
        start(**settings)[2].run(STEPS).emit("attached")
    start(**settings, target_rank=1)[2].run(STEPS).emit("attached")
