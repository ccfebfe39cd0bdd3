"""DSEE: a sparse base, and a low-rank and sparse change beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deltaworks as dw
from deltaworks.core.operators.low_rank_sparse import outliers, packed, unpacked
from deltaworks.core.operators.pruned_weight import Coefficients, Pruned, PrunedLowRankSparse
from deltaworks.core.shrinking import heads, neurons, without_heads, without_neurons
from deltaworks.model.anatomy import describe
from tests.conformance.subject import nudge
from tests.families import FAMILIES
from tests.methods.resuming import trained

SETTINGS = {"rank": 2, "entries": 9, "first": 3, "ratio": 0.5}


def attached(family: str = "bert", **settings):
    model, batch = FAMILIES[family]()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.01)  # distinct magnitudes
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = dw.attach(model, dw.DSEE(**(SETTINGS | settings)), seed=0)
    return model, batch, plain, tuned


def run(model, batch, tuned, steps: int = 6):
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2))
    rules = tuned.run(steps, optimizer=optimizer)
    rules.emit("attached")
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(**batch)[0].float().square().mean().backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        yield step
    rules.emit("finished")


def zeros(tuned: dw.Tuned, kind: type) -> tuple[int, int]:
    """Pruned entries and all entries of the parts of a kind."""
    masks = [part.mask() for part in tuned.parts() if type(part) is kind]
    return sum(int((~mask).sum()) for mask in masks), sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("shape", [(5, 7), (4, 8), (1, 1), (3, 11)])
def test_masks_are_kept_as_bits(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    bits = packed(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, *shape), mask)


def test_the_entries_are_what_a_rank_one_decomposition_leaves_of_the_pretrained_weight() -> None:
    torch.manual_seed(0)
    w = torch.outer(torch.randn(40), torch.randn(30))
    spikes = torch.randperm(1200)[:6]
    w.view(-1)[spikes] += torch.tensor([4.0, -5, 6, 4.5, -4.2, 5.5])
    assert outliers(w, 6).tolist() == spikes.sort().values.tolist()
    model, batch, plain, tuned = attached()
    torch.manual_seed(0)
    for name, part in tuned.named_parts():
        if isinstance(part, PrunedLowRankSparse):
            assert "query" in name or "value" in name
            torch.randn(part.a.shape)  # is drawn before
            assert part.index.tolist() == outliers(plain[name], 9).tolist()
            assert len(part.index) == 9 and len(set(part.index.tolist())) == 9 and not part.values.any()
            assert torch.equal(model.get_parameter(name), plain[name])
    places = [part.index.clone() for _, part in tuned.of_kind(PrunedLowRankSparse)]
    list(run(model, batch, tuned))
    for (_, part), before in zip(tuned.of_kind(PrunedLowRankSparse), places, strict=True):
        assert torch.equal(part.index, before) and part.values.any()


def test_trained_values_are_the_formula() -> None:
    _, _, _, tuned = attached(rank=16, entries=64)
    per_layer = [sum(p.numel() for p in part.parameters()) for part in tuned.parts() if part.site.role in
                 ("attention.query", "attention.value")]  # fmt: skip
    assert per_layer == [16 * (32 + 32) + 64] * 4
    assert sum(per_layer) == sum(p.numel() for p in tuned.parameters())


@pytest.mark.parametrize("ratio", [0.5, 0.37])
@pytest.mark.parametrize("score", ["W", "WAB", "WABS"])
def test_both_pools_lose_their_smallest_entries_once_and_for_all(ratio: float, score: str) -> None:
    model, batch, plain, tuned = attached(ratio=ratio, score=score)
    masks = None
    for step in run(model, batch, tuned):
        if step < 3:
            assert all(part.mask() is None for part in tuned.parts())
            before = {n: p.scale * p.b.detach() @ p.a.detach() for n, p in tuned.named_parts() if hasattr(p, "a")}
            continue
        if step == 3:
            for kind in (Pruned, PrunedLowRankSparse):
                gone, whole = zeros(tuned, kind)
                assert gone == round(ratio * whole)
            masks = [part.mask() for part in tuned.parts()]
            assert before
        assert all(torch.equal(part.mask(), mask) for part, mask in zip(tuned.parts(), masks, strict=True))
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in plain.items())
    others = [(plain[name].abs(), part.mask()) for name, part in tuned.named_parts() if type(part) is Pruned]
    assert max(w[~m].max() for w, m in others) <= min(w[m].min() for w, m in others)
    if score == "W":
        mine = [(plain[n].abs(), p.mask()) for n, p in tuned.named_parts() if type(p) is PrunedLowRankSparse]
        assert max(w[~m].max() for w, m in mine) <= min(w[m].min() for w, m in mine)


@pytest.mark.parametrize("inside", [False, True])
def test_the_layer_is_the_masked_base_and_its_change_in_outputs_and_gradients(inside: bool) -> None:
    model, batch, plain, tuned = attached(inside=inside, score="W")
    list(run(model, batch, tuned))
    nudge(tuned)
    for name, part in tuned.named_parts():
        layer, mask = model.get_submodule(name.rpartition(".")[0]), part.mask()
        x = torch.randn(3, layer.in_features, requires_grad=True)
        w = plain[name]
        if isinstance(part, Pruned):
            expected, inputs = w * mask, [x]
        else:
            sparse = torch.zeros(w.numel()).index_add(0, part.index.long(), part.values).view_as(w)
            change = part.scale * (part.b @ part.a + sparse)
            assert int((sparse != 0).sum()) <= 9
            expected, inputs = (w + change) * mask if inside else w * mask + change, [x, *part.parameters()]
        y, wanted = layer(x), x @ expected.T + layer.bias
        assert torch.allclose(y, wanted, atol=1e-5)
        assert torch.allclose(part.fold(w), expected, atol=1e-6)
        g = torch.randn_like(y)
        theirs = torch.autograd.grad(wanted, inputs, g)
        for ours, right in zip(torch.autograd.grad(y, inputs, g), theirs, strict=True):
            assert torch.allclose(ours, right, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(layer(x).float(), wanted, atol=0.3)


def test_merging_fills_zeros_unless_the_mask_is_over_the_change_as_well() -> None:
    for inside in (False, True):
        model, batch, _, tuned = attached(inside=inside)
        list(run(model, batch, tuned))
        beside = model(**batch)[0].detach()
        masks = {name: part.mask() for name, part in tuned.named_parts()}
        trained_ones = {name for name, part in tuned.named_parts() if not isinstance(part, Pruned)}
        dw.bake(model)
        assert torch.allclose(model(**batch)[0], beside, atol=1e-5)
        for name, mask in masks.items():
            filled = bool(model.get_parameter(name)[~mask].any())
            assert filled == (name in trained_ones and not inside), name


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pruned_heads_can_be_taken_out_and_the_work_falls_by_their_share(family: str) -> None:
    model, batch, plain, tuned = attached(family, prune="heads", ratio=0.5)
    base, scores = describe(model), {}
    for step in run(model, batch, tuned):
        if step == 3:
            for name, part in tuned.named_parts():
                if part.site.role in ("attention.query", "attention.value"):
                    units = base.blocks[part.site.block].num_kv_heads or base.blocks[part.site.block].num_heads
                    now = (plain[name] + part.dense().detach()).abs().view(units, -1).sum(1)
                    scores[part.site.block] = scores.get(part.site.block, 0) + now
    gone = {}
    for block in base.blocks:
        found = heads(base, block)
        assert found is not None and found.units == len(scores[block.index])
        gone[block.index] = sorted(scores[block.index].argsort()[: round(found.units / 2)].tolist())
        by_path = {part.site.path: part.mask() for part in tuned.parts()}
        for role, site in found.sites.items():
            mask = by_path[site.path].T if role == "output" else by_path[site.path]
            left = mask.reshape(found.units, -1).float().mean(1)
            assert [unit for unit in range(found.units) if left[unit] == 0] == gone[block.index]
            assert set(left.tolist()) == {0.0, 1.0}
    with torch.no_grad():
        expected = model(**batch)[0]
        dw.bake(model)
        with FlopCounterMode(display=False) as whole:
            model(**batch)
        without_heads(model, gone)
        with FlopCounterMode(display=False) as small:
            assert torch.allclose(model(**batch)[0], expected, atol=1e-5)
    now = heads(describe(model), describe(model).blocks[0])
    layers = {role: model.get_submodule(site.path) for role, site in found.sites.items()}
    assert layers["query"].weight.shape[0] == plain[f"{found.sites['query'].path}.weight"].shape[0] // 2
    assert layers["output"].weight.shape[1] == layers["query"].weight.shape[0] and now is not None
    tokens = batch["input_ids"].numel()
    saved = sum(plain[f"{site.path}.weight"].numel() for site in found.sites.values()) * len(base.blocks)
    # Half of the four products, each a multiplication and an addition; attention itself falls as well.
    assert whole.get_total_flops() - small.get_total_flops() >= 2 * tokens * saved / 2


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_coefficients_choose_heads_and_neurons_which_can_be_taken_out(family: str) -> None:
    model, batch, plain, tuned = attached(family, prune="coefficients", ratio=0.5, neurons=0.4, l1=0.1)
    rule = tuned.rules[0]
    parts = [part for part in tuned.parts() if isinstance(part, Coefficients)]
    assert len(parts) == 4 and all(torch.equal(part.c, torch.ones_like(part.c)) for part in parts)
    total = sum(part.c.numel() for part in parts)
    assert torch.allclose(rule.penalty(tuned.run(6).run), torch.tensor(0.1 * total))
    base, lows = describe(model), {}
    for step in run(model, batch, tuned):
        if step == 2:
            for part in parts:
                with torch.no_grad():
                    part.c.mul_(torch.rand(part.c.shape, generator=torch.Generator().manual_seed(len(part.c))) + 0.5)
        if step == 3:
            held = [part.c.detach().clone() for part in parts]
            for part in parts:
                share = 0.5 if part.site.role == "attention.output" else 0.4
                lows[part] = sorted(part.c.abs().argsort()[: round(share * len(part.c))].tolist())
                assert (part.stays == 0).nonzero().flatten().tolist() == lows[part] and lows[part]
    assert all(torch.equal(part.c, c) for part, c in zip(parts, held, strict=True)), "they are fixed once chosen"
    of_heads, of_neurons = (
        {part.site.block: low for part, low in lows.items() if part.site.role == role}
        for role in ("attention.output", "mlp.down")
    )
    assert heads(base, base.blocks[0]).units == len(parts[0].c)
    with torch.no_grad():
        expected = model(**batch)[0]
        dw.bake(model)
        assert torch.allclose(model(**batch)[0], expected, atol=1e-5)
        without_heads(without_neurons(model, of_neurons), of_heads)
        assert torch.allclose(model(**batch)[0], expected, atol=1e-5)
    for role, site in neurons(base, base.blocks[1]).items():
        small, whole = model.get_submodule(site.path).weight, plain[f"{site.path}.weight"]
        side = 1 if role == "down" else 0
        assert small.shape[side] == whole.shape[side] - round(0.4 * whole.shape[side])


@pytest.mark.parametrize("score", ["W", "WAB", "WABS"])
def test_heads_are_scored_as_asked(score: str) -> None:
    model, batch, _, tuned = attached(prune="heads", ratio=0.25, score=score)
    with torch.no_grad():
        for name, part in tuned.of_kind(PrunedLowRankSparse):  # the first head is the weakest but for its change
            model.get_parameter(name)[:8].mul_(0.1)
            part.b[:8].fill_(10.0)
    list(run(model, batch, tuned))
    for _, part in tuned.of_kind(PrunedLowRankSparse):
        assert bool(part.mask()[:8].any()) == (score != "W") and not part.mask().all()


def test_heads_that_cannot_be_taken_out_are_refused_and_nothing_changes() -> None:
    model, _ = FAMILIES["gpt2"]()
    with pytest.raises(ValueError, match="no rows of layers of their own"):
        without_heads(model, {0: [0]})
    model, _ = FAMILIES["bert"]()
    with pytest.raises(ValueError, match="would lose all its 4 heads"):
        without_heads(model, {0: [0], 1: [0, 1, 2, 3]})
    assert all(layer.weight.shape == (32, 32) for name, layer in model.named_modules() if name.endswith("query"))
    dw.attach(model, dw.LoRA())
    with pytest.raises(ValueError, match="still has adapters"):
        without_heads(model, {0: [0]})


def test_a_saved_adapter_brings_its_masks(tmp_path: Path) -> None:
    model, batch, plain, tuned = attached("gpt2")
    list(run(model, batch, tuned))
    expected = model(**batch)[0].detach()
    dw.save(model, tmp_path / "adapter")
    fresh, _ = FAMILIES["gpt2"]()
    fresh.load_state_dict(plain, strict=False)
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch)[0], expected)


@pytest.mark.parametrize("prune", ["entries", "coefficients"])
def test_it_resumes_at_any_step_bit_for_bit(prune: str, tmp_path: Path) -> None:
    method = dw.DSEE(**SETTINGS, prune=prune)
    whole, history, _ = trained(method, tmp_path, steps=6)
    for stop in (2, 3, 5):
        resumed, again, _ = trained(method, tmp_path, steps=6, stop=stop)
        assert list(whole) == list(resumed) and history == again, stop
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), stop


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("family", "on"), [("cnn", nn.Conv2d), ("llama", nn.Embedding)])
def test_masks_act_at_convolutions_and_embeddings_as_when_merged(family: str, on: type, inside: bool) -> None:
    model, batch, _, tuned = attached(family, on=on, inside=inside)
    rules = tuned.run(6, optimizer=torch.optim.AdamW(tuned.parameter_groups(1e-2)))
    rules.emit("attached")
    for _ in range(6):
        rules.step(lambda: model(**batch)["logits"].square().mean())
    gone, whole = zeros(tuned, PrunedLowRankSparse)
    assert gone == round(whole / 2)
    for name, part in tuned.of_kind(PrunedLowRankSparse):
        assert part.site.kind in ("conv", "embedding"), name
    beside = model(**batch)["logits"].detach()
    dw.merge(model)
    assert torch.allclose(model(**batch)["logits"], beside, atol=1e-5)


def test_it_refuses_experts_in_one_tensor_and_a_run_that_ends_before_it_prunes() -> None:
    with pytest.raises(ValueError, match="dsee: model.layers.0.* holds 4 experts in one tensor"):
        attached("mixtral", on="mlp")
    with pytest.raises(ValueError, match="dsee: first takes 6 of the run's 6 steps"):
        attached(first=6)[3].run(6).emit("attached")
    attached(first=6, prune="nothing")[3].run(6).emit("attached")
