"""RoSA: low rank plus entries chosen by their gradients."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.low_rank_sparse import LowRankSparse, sampled
from deltaworks.model.loading import load_base
from deltaworks.model.weights import Weight
from tests.families import FAMILIES
from tests.methods.toys import nudge, saved_shapes


def made(dropout: float = 0.0) -> LowRankSparse:
    g = torch.Generator().manual_seed(0)
    a, b, values = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((2, 7), (5, 2), (6,)))
    return LowRankSparse(a, b, values, torch.randperm(35, generator=g)[:6], scale=0.5, dropout=dropout)


def attached(**settings):
    model, batch = FAMILIES["llama"]()
    base = model(**batch).logits.detach()
    settings = {"rank": 4, "density": 0.02, "warmup": 3, "dropout": 0.0} | settings
    tuned = dw.attach(model, dw.RoSA(**settings), data=[batch], seed=0)
    return model, batch, base, tuned


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(5, 64, (2, 9), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def chosen(model: torch.nn.Module, data: list, **settings) -> dict[str, set[int]]:
    """The entries that RoSA chooses in every weight, by name."""
    tuned = dw.attach(model, dw.RoSA(rank=4, density=0.02, **settings), data=data, seed=0)
    return {name: set(delta.index.tolist()) for name, delta in tuned.named_parts()}


def gradients(model: torch.nn.Module, names: list[str], batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: model.get_parameter(name).grad.clone() for name in names}


def largest(statistic: torch.Tensor, count: int) -> set[int]:
    return set(statistic.abs().flatten().topk(count).indices.tolist())


def test_the_fused_product_is_the_matrix_in_outputs_and_gradients() -> None:
    delta = made()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inputs = (x, *delta.parameters())
    dense = x @ (weight + delta.dense()).T + bias
    g = torch.randn_like(dense)
    for fast in (delta.with_base(x, weight, bias), delta.side(x) + x @ weight.T + bias):
        assert torch.allclose(fast, dense)
        wanted = torch.autograd.grad(dense, inputs, g, retain_graph=True)
        for ours, theirs in zip(torch.autograd.grad(fast, inputs, g), wanted, strict=True):
            assert torch.allclose(ours, theirs)


def test_gradients_are_sampled_from_the_dense_one_in_any_number_of_chunks(monkeypatch) -> None:
    g, x = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    index = torch.randperm(35)[:13]
    assert torch.allclose(sampled(g, x, index), (g.T @ x).flatten()[index])
    monkeypatch.setattr("deltaworks.core.operators.low_rank_sparse.CHUNK", 22)
    assert torch.allclose(sampled(g, x, index), (g.T @ x).flatten()[index])


def test_gradient_and_state_have_the_size_of_the_entries_and_only_the_input_is_kept() -> None:
    delta = made()
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    shapes = saved_shapes(lambda: delta.with_base(x, torch.zeros(5, 7, dtype=torch.float64), None))
    assert sorted(set(shapes)) == [(4, 2), (4, 7), (5, 7), (6,)]  # (5, 7) is the frozen base itself
    delta.with_base(x, torch.zeros(5, 7, dtype=torch.float64), None).sum().backward()
    assert delta.values.grad.shape == (6,)


@pytest.mark.parametrize("average", ["squares", "gradients"])
def test_the_largest_gradients_of_every_layer_are_chosen(average: str) -> None:
    model, batch, base, tuned = attached(warmup=0, average=average)
    assert torch.equal(model(**batch).logits, base)
    plain, _ = FAMILIES["llama"]()
    plain(**batch).loss.backward()
    for path, delta in tuned.named_parts():
        gradient = plain.get_parameter(path).grad.abs().flatten()
        k = int(0.02 * gradient.numel())
        assert len(delta.values) == k
        assert set(delta.index.tolist()) == set(gradient.topk(k).indices.tolist())


@pytest.mark.parametrize("average", ["squares", "gradients"])
def test_over_several_batches_the_average_of_squares_is_not_the_square_of_the_average(average: str) -> None:
    data = batches(3)
    found = chosen(FAMILIES["llama"]()[0], data, warmup=0, batches=3, average=average)
    plain, _ = FAMILIES["llama"]()
    each = [gradients(plain, list(found), batch) for batch in data]
    differ = []
    for name, entries in found.items():
        g = torch.stack([one[name] for one in each])
        wanted = {"squares": g.square().mean(0), "gradients": g.mean(0)}
        assert entries == largest(wanted.pop(average), len(entries))
        differ.append(entries != largest(*wanted.values(), len(entries)))
    assert any(differ)


def test_after_the_warm_up_the_gradient_of_the_effective_weight_decides() -> None:
    data = batches(2)
    found = chosen(FAMILIES["llama"]()[0], data, warmup=3, warmup_lr=0.02)
    warm, _ = FAMILIES["llama"]()
    lora = dw.attach(warm, dw.LoRA(rank=4, alpha=16.0), seed=0)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.02, weight_decay=0.0)
    for batch in (data[0], data[1], data[0]):
        optimizer.zero_grad()
        warm(**batch).loss.backward()
        optimizer.step()
    effective, base = FAMILIES["llama"]()[0], FAMILIES["llama"]()[0]
    with torch.no_grad():
        for name, delta in lora.named_parts():
            effective.get_parameter(name).add_(delta.dense())
    wanted, before = (gradients(model, list(found), data[1]) for model in (effective, base))
    assert all(entries == largest(wanted[name], len(entries)) for name, entries in found.items())
    assert any(entries != largest(before[name], len(entries)) for name, entries in found.items())


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_quantised_base_chooses_as_its_dequantised_values_do(warmup: int, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    dense, _ = FAMILIES["llama"]()
    dense.save_pretrained(tmp_path)
    packed = load_base(tmp_path, quantize="nf4")
    found = chosen(packed, batches(2), warmup=warmup, warmup_lr=0.02, batches=2)
    with torch.no_grad():
        for name in found:
            values = Weight(packed.get_submodule(name.removesuffix(".weight"))).dense()
            dense.get_parameter(name).copy_(values)
    assert found == chosen(dense, batches(2), warmup=warmup, warmup_lr=0.02, batches=2)


def test_the_warm_up_leaves_no_trace_but_the_choice() -> None:
    model, batch, base, tuned = attached(warmup=5, warmup_lr=0.05)
    assert torch.equal(model(**batch).logits, base)
    assert list(tuned.state.adapters) == ["default"]
    assert all(not delta.values.any() and not delta.b.any() for delta in tuned.parts())
    other = attached(warmup=0)[3]
    chosen = [torch.cat([delta.index for delta in t.parts()]) for t in (tuned, other)]
    assert not torch.equal(*chosen)


def test_the_change_is_sparse_off_the_low_rank_part_and_merges() -> None:
    model, batch, _, tuned = attached()
    nudge(tuned)
    for delta in tuned.parts():
        rest = (delta.dense() - delta.scale * delta.b @ delta.a).flatten()
        outside = torch.ones_like(rest, dtype=torch.bool)
        outside[delta.index.long()] = False
        assert rest[outside].abs().max() < 1e-6
    beside = model(**batch).logits
    dw.merge(model)
    assert torch.allclose(model(**batch).logits, beside, atol=1e-5)


def test_s_learns_at_a_rate_of_its_own() -> None:
    _, _, _, tuned = attached()
    groups = {tuple(sorted({n.rsplit(".", 1)[1] for n in g["names"]})): g["lr"] for g in tuned.parameter_groups(7e-4)}
    assert groups == {("a", "b"): 7e-4, ("values",): pytest.approx(2e-4)}


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_weight_that_no_batch_reaches_has_no_gradient_and_as_many_entries(warmup: int) -> None:
    model, batch = FAMILIES["mlp"]()
    model.idle = torch.nn.Linear(10, 20)
    base = model(**batch).logits.detach()
    tuned = dw.attach(model, dw.RoSA(on=torch.nn.Linear, rank=2, warmup=warmup), data=[batch], seed=0)
    entries = {name.partition(".")[0]: len(part.values) for name, part in tuned.named_parts()}
    assert entries == {"first": 9, "second": 9, "last": 1, "idle": 1}
    assert torch.equal(model(**batch).logits, base)


def test_tied_weights_are_chosen_by_their_gradient() -> None:
    model, batch = FAMILIES["qwen2"]()
    found = chosen(model, [batch], warmup=0, on=["embedding", "head"])
    embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert head == {place % 64 * 32 + place // 64 for place in embedding}, "each as it sees the one tensor"


def test_s_counts_once_at_convolutions_of_any_groups() -> None:
    model, batch = FAMILIES["cnn"]()
    tuned = dw.attach(model, dw.RoSA(on=torch.nn.Conv2d, rank=2, density=0.1, warmup=0), data=[batch], seed=0)
    assert {model.get_submodule(name.rpartition(".")[0]).groups for name, _ in tuned.named_parts()} == {1, 2}
    nudge(tuned)
    beside = model(**batch).logits.detach()
    dw.merge(model)
    assert torch.allclose(model(**batch).logits, beside, atol=1e-5)
