"""COLA: knots change nothing but what trains, and links add up to a rank no link has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltaworks as dw
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part


def train(links: int, count: int, look=None, **settings):
    """A plain loop; `look(step, model, optimizer, when)` around the end of every step."""
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.ColaChain, rank=2, links=links, **settings)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.05))
    rules = tuned.run(count, optimizer=optimizer)
    rules.emit("attached")
    for step in range(1, count + 1):
        optimizer.zero_grad()
        rules.emit("step_begin")
        (model(x) - target).square().mean().backward()
        rules.emit("gradients")
        optimizer.step()
        before = (model(x).detach(), optimizer.param_groups[0]["lr"])
        rules.emit("step_end")
        if look:
            look(step, model(x).detach(), optimizer, tuned, before)
    rules.emit("finished")
    return model, x, tuned


def test_a_knot_leaves_the_output_and_drops_the_optimizers_state() -> None:
    knots, rates = [], []

    def look(step, after, optimizer, tuned, before) -> None:
        assert torch.allclose(after, before[0], atol=1e-12)
        rates.append(before[1])
        if not optimizer.state:
            knots.append(step)
            assert all(delta.b.abs().max() == 0 and delta.a.abs().max() > 0 for delta in tuned.parts())

    train(3, 9, look)
    assert knots == [3, 6]
    # The rate begins anew with every link.
    assert torch.allclose(torch.tensor(rates), 0.05 * torch.tensor([1, 2 / 3, 1 / 3] * 3))


def test_without_restart_the_runs_schedule_goes_on() -> None:
    rates = []
    train(3, 6, lambda step, after, optimizer, tuned, before: rates.append(before[1]), restart=False)
    assert rates == [0.05] * 6


def test_knots_may_be_given_and_the_rate_rises_in_every_link() -> None:
    knots, rates = [], []

    def look(step, after, optimizer, tuned, before) -> None:
        assert torch.allclose(after, before[0], atol=1e-12)
        rates.append(before[1])
        if not optimizer.state:
            knots.append(step)

    train(3, 9, look, knots=[2, 7], warmup=0.5)
    assert knots == [2, 7]
    assert torch.allclose(torch.tensor(rates), 0.05 * torch.tensor([1 / 2, 1, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 1 / 2, 1]))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"knots": [5, 5], "links": 3}, r"knots=\[5, 5\] .* each above the one before"),
        ({"knots": [0]}, "of at least 1"),
        ({"knots": [3, 6]}, r"knots=\[3, 6\] are 2; 2 links have 1 knots"),
        ({"knots": [3], "ranks": [4, 2, 1]}, "are 1; 3 links have 2 knots"),
        ({"warmup": 1.0}, "warmup=1.0 .* below 1"),
        ({"warmup": 0.1, "restart": False}, "warmup=0.1 is for restart=True"),
        ({"knots": [3], "overrides": {"first": {"knots": [2]}}}, "knots is the same at all places"),
    ],
)
def test_wrong_knots_and_warm_ups_are_refused(settings: dict, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"^cola_chain: .*{wrong}"):
        dw.ColaChain(**settings)


def test_knots_lie_within_the_run() -> None:
    train(2, 4, knots=[3])
    with pytest.raises(ValueError, match=r"cola_chain: knots=\[3\]; all must be below the run's 3 steps"):
        train(2, 3, knots=[3])


def test_the_rank_of_the_change_grows_with_the_links() -> None:
    _, _, one = train(1, 12)
    _, _, three = train(3, 12)
    ranks = [int(torch.linalg.matrix_rank(part(tuned).dense(), rtol=1e-6)) for tuned in (one, three)]
    assert ranks == [2, 6]


def test_one_link_is_lora_to_the_bit() -> None:
    _, _, chain = train(1, 4)
    model, x = net(12, 8, 6)
    lora = attach(model, dw.LoRA, rank=2)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    optimizer = torch.optim.AdamW(lora.parameter_groups(0.05))
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(chain.tensors().values(), lora.tensors().values(), strict=True))


def test_falling_ranks_save_state_and_add_up() -> None:
    sizes = []

    def look(step, after, optimizer, tuned, before) -> None:
        assert torch.allclose(after, before[0], atol=1e-12)
        sizes.append(sum(p.numel() for p in tuned.parameters()))

    _, _, tuned = train(2, 9, look, ranks=[4, 2, 1])
    assert sizes == [136] * 2 + [68] * 3 + [34] * 4  # of links that are complete when they are looked at
    assert int(torch.linalg.matrix_rank(part(tuned).dense(), rtol=1e-6)) == 7
    for ranks in ([2, 4], [], [2.0], [1, 0]):
        with pytest.raises(ValueError, match="cola_chain: ranks=.* none above the one before"):
            dw.ColaChain(ranks=ranks)


@pytest.mark.parametrize("stop", range(1, 6))
@pytest.mark.parametrize(
    "settings", [{"restart": False}, {"knots": [4], "warmup": 0.5}], ids=["falling_ranks", "given_knots"]
)
def test_chains_survive_a_file_and_a_resume(settings: dict, stop: int, tmp_path) -> None:
    def begin():
        model, x = net(12, 8, 6)
        tuned = attach(model, dw.ColaChain, ranks=[4, 2], **settings)
        optimizer = torch.optim.AdamW(tuned.parameter_groups(0.05))
        rules = tuned.run(6, optimizer=optimizer)
        return model, x, tuned, optimizer, rules

    def go(model, x, optimizer, rules, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            rules.emit("gradients")
            optimizer.step()
            rules.emit("step_end")

    model, x, tuned, optimizer, rules = begin()
    rules.emit("attached")
    go(model, x, optimizer, rules, stop)
    kept = copy.deepcopy((tuned.tensors(), optimizer.state_dict(), rules.state_dict()))
    go(model, x, optimizer, rules, 6 - stop)
    dw.save(model, tmp_path)
    fresh, _ = net(12, 8, 6)
    dw.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    again, _, tuned, optimizer, rules = begin()
    rules.load_state_dict(kept[2])
    own = tuned.tensors()
    with torch.no_grad():
        for name, value in kept[0].items():
            own[name].copy_(value)
    optimizer.load_state_dict(kept[1])
    go(again, x, optimizer, rules, 6 - stop)
    assert torch.equal(again(x), model(x))


def test_memory_is_the_same_at_every_link() -> None:
    sizes = set()

    def look(step, after, optimizer, tuned, before) -> None:
        state = sum(t.numel() for one in optimizer.state.values() for t in one.values() if t.dim())
        held = sum(t.numel() for t in tuned.tensors().values())
        sizes.add((held, state) if optimizer.state else (held, None))

    train(3, 6, look)
    assert len({held for held, _ in sizes}) == 1 and len(sizes) == 2


def test_links_of_stacked_experts_are_tied_too() -> None:
    model, batch = FAMILIES["mixtral"]()
    tuned = dw.attach(model, dw.ColaChain(rank=2, on="experts"), seed=0)
    rules = tuned.run(2)
    rules.emit("attached")
    for parameter in tuned.parameters():
        parameter.data += 0.1
    before = copy.deepcopy(model)(**batch).logits
    rules.emit("step_end")
    assert torch.allclose(model(**batch).logits, before, atol=1e-5)
    assert all(part.get_parameter("b").abs().max() == 0 for part in tuned.parts())


@pytest.mark.parametrize(
    ("override", "ranks"), [({"rank": 3}, [6, 4]), ({"ranks": [3, 1]}, [4, 4])], ids=["rank", "ranks"]
)
def test_links_may_have_other_ranks_at_some_places(override: dict, ranks: list[int]) -> None:
    def look(step, after, optimizer, tuned, before) -> None:
        assert torch.allclose(after, before[0], atol=1e-12)

    _, _, tuned = train(2, 8, look, overrides={"first": override})
    assert [int(torch.linalg.matrix_rank(delta.dense(), rtol=1e-6)) for delta in tuned.parts()] == ranks


def test_the_number_of_links_is_one_for_all_places() -> None:
    with pytest.raises(ValueError, match=r"cola_chain: overrides\['first'\] has 3 links; all places have 2"):
        dw.ColaChain(links=2, overrides={"first": {"ranks": [3, 2, 1]}})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_finished_links_are_part_of_the_weight_which_no_dropout_comes_before(kind: type, autocast: bool) -> None:
    torch.manual_seed(0)
    layer, shape = (nn.Linear(6, 5), (3, 6)) if kind is nn.Linear else (nn.Conv2d(6, 5, 3), (2, 6, 4, 4))
    model, x = nn.Sequential(layer), torch.randn(shape, requires_grad=True)
    tuned = dw.attach(model, dw.ColaChain(on=kind, rank=2, alpha=2.0, dropout=0.5), seed=0)
    rules = tuned.run(2)
    rules.emit("attached")
    nudge(tuned, 0.3)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        return y.detach(), torch.autograd.grad(y.float().sum(), x)[0]

    assert not torch.equal(call()[0], call()[0])  # of the link that trains some inputs are dropped
    rules.emit("step_end")
    trained = [call(), call()]
    model.eval()
    for y, gradient in trained:
        assert torch.equal(y, trained[0][0])
        assert torch.allclose(y, call()[0], atol=0.05 if autocast else 1e-5)
        assert torch.allclose(gradient, call()[1], atol=0.05 if autocast else 1e-5)
    assert part(tuned, "0").dense().abs().max() > 0.1


def test_parts_of_a_fused_layer_drop_no_input_of_finished_links_either() -> None:
    model, _ = FAMILIES["gpt2"]()
    tuned = dw.attach(model, dw.ColaChain(on=["attention.query", "attention.value"], rank=2, dropout=0.5), seed=0)
    rules = tuned.run(2)
    rules.emit("attached")
    nudge(tuned, 0.3)
    rules.emit("step_end")
    x = torch.randn(3, next(tuned.parts()).a.shape[1])
    for delta in tuned.parts():
        delta.train()
        assert torch.allclose(delta.side(x), x @ delta.dense().T, atol=1e-5) and delta.dense().abs().max() > 0.01
