"""What NeFT must hold: whole neurons, chosen by how far a probe turned them, trained from the original weights."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.neurons import Neurons
from deltaworks.statistics import cosines
from tests.families import FAMILIES


def probed(model: torch.nn.Module, batches: list, steps: int, lr: float) -> dict[str, torch.Tensor]:
    """The feed-forward weights after a plain AdamW fine-tune of every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if ".mlp." in name}


METHOD = dw.NeFT(neurons=20, probe_steps=3, probe_lr=1e-2)


def test_the_chosen_neurons_are_those_of_lowest_cosine_in_one_pool() -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, METHOD, data=[batch])
    twin, _ = FAMILIES["llama"]()
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    after = probed(twin, [batch], 3, 1e-2)
    pool = []
    for layer in (0, 1):
        for name, side in (("up_proj", "in"), ("down_proj", "out")):
            path = f"model.layers.{layer}.mlp.{name}"
            old, new = before[f"{path}.weight"], after[f"{path}.weight"]
            scores = cosines(old, new) if side == "in" else cosines(old.T, new.T)
            pool += [(float(score), path, i) for i, score in enumerate(scores)]
    wanted = {(path, i) for _, path, i in sorted(pool)[:20]}
    assert {(part.site.path, int(i)) for part in tuned.parts() for i in part.index} == wanted


def test_whole_rows_and_columns_change_and_nothing_else() -> None:
    model, batch = FAMILIES["llama"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = dw.attach(model, METHOD, data=[batch])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if "deltaworks" not in n.split("."))
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2, weight_decay=0.1))
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(p.numel() for p in tuned.parameters()) == 20 * 32
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert state == 2 * 20 * 32
    dw.bake(model)
    changed = {name: value != before[name] for name, value in model.state_dict().items()}
    rows = [mask for name, mask in changed.items() if name.endswith("up_proj.weight")]
    columns = [mask.T for name, mask in changed.items() if name.endswith("down_proj.weight")]
    touched = sum(int(mask.any(1).sum()) for mask in rows + columns)
    assert touched == 20 and sum(int(mask.sum()) for mask in rows + columns) == 20 * 32
    assert not any(mask.any() for name, mask in changed.items() if "up_proj" not in name and "down_proj" not in name)


def test_a_neuron_that_only_grew_is_not_chosen() -> None:
    w = torch.randn(4, 8)
    grown = torch.stack([w[0] * 2, w[1] + 0.5, -w[2], w[3]])
    scores = cosines(w, grown)
    assert torch.allclose(scores[[0, 2, 3]], torch.tensor([1.0, -1.0, 1.0])) and scores[1] < 1
    assert int(scores.argmin()) == 2


def test_one_side_of_a_neuron_may_be_chosen_without_the_other() -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, METHOD, data=[batch])
    chosen = {part.site.path: set(part.index.tolist()) for part in tuned.parts()}
    assert chosen["model.layers.0.mlp.up_proj"] != chosen.get("model.layers.0.mlp.down_proj", set())


def test_the_share_counts_against_the_whole_base_and_gates_take_part_when_asked() -> None:
    model, batch = FAMILIES["llama"]()
    total = sum(p.numel() for p in model.parameters())
    tuned = dw.attach(model, dw.NeFT(share=0.05, probe_steps=1, gate=True), data=[batch])
    assert sum(p.numel() for p in tuned.parameters()) == 32 * round(0.05 * total / 32)
    assert any(part.site.role == "mlp.gate" for part in tuned.parts())


@pytest.mark.parametrize("columns", [False, True])
def test_the_fast_product_is_the_dense_one_and_its_gradients_too(columns: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5).double().requires_grad_(False)
    index, length = torch.tensor([1, 3]), 5 if columns else 6
    delta = Neurons(torch.randn(2, length, dtype=torch.float64), index, 6 if columns else 5, columns)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)

    def fast(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return delta.with_base(x, layer.weight, layer.bias)

    dense = torch.nn.functional.linear(x, layer.weight + delta.dense(), layer.bias)
    assert torch.allclose(fast(x, delta.d), dense, atol=1e-12)
    assert torch.allclose(layer(x) + delta.side(x), dense, atol=1e-12)
    assert torch.autograd.gradcheck(fast, (x, delta.d))


def test_columns_keep_only_the_chosen_channels() -> None:
    layer = torch.nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(100, 64, requires_grad=True)
    delta = Neurons(torch.zeros(3, 32), torch.tensor([1, 5, 9]), 64, columns=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        delta.with_base(x, layer.weight, layer.bias)
    assert sum(saved) - layer.weight.numel() <= 100 * 3 + 3 * 32 + 3


def test_fused_experts_are_chosen_from_one_pool_as_well() -> None:
    model, batch = FAMILIES["mixtral"]()
    base = model(**batch).logits
    tuned = dw.attach(model, dw.NeFT(neurons=30, probe_steps=2, probe_lr=1e-2), data=[batch])
    assert sum(len(part.index) for part in tuned.parts()) == 30
    assert {part.experts for part in tuned.parts()} == {4}
    assert torch.equal(model(**batch).logits, base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.normal_(std=0.1)
    beside = model(**batch).logits
    dw.merge(model)
    assert torch.allclose(model(**batch).logits, beside, atol=1e-5)
