"""Router loads count what the model itself chooses; a probe moves the base and puts it back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaworks.model.anatomy import describe
from deltaworks.statistics import probe, router_loads
from tests.families import FAMILIES


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_loads_are_the_routers_own_choices(family: str) -> None:
    model, batch = FAMILIES[family]()
    base = describe(model)
    routers = [block.router for block in base.blocks if block.router]
    chosen: dict[str, list] = {path: [] for path in routers}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda m, a, y, path=path: chosen[path].append(y[2]))
        for path in routers
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    visible = batch["attention_mask"].bool().flatten()
    loads = router_loads(base, [batch, batch])
    assert [base.blocks[index].router for index in loads] == routers
    for index, load in loads.items():
        picks = chosen[base.blocks[index].router][0][visible]
        expected = torch.stack([(picks == expert).sum() for expert in range(4)])
        assert torch.equal(load.counts, 2 * expected)
        assert load.tokens == 2 * int(visible.sum()) == round(float(load.mass.sum()))


def test_a_dense_model_has_no_loads() -> None:
    model, batch = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="no mixture of experts"):
        router_loads(describe(model), [batch])


class Noisy(nn.Module):
    """A regression with dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.line = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.line(self.drop(self.norm(x))) - labels).square().mean()}


def test_a_probe_sees_the_tuned_values_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Noisy().eval()
    model.norm.requires_grad_(False)
    batch = {"x": torch.randn(8, 4), "labels": torch.ones(8, 1)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def read(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: (p - old[name]).abs().max() for name, p in model.named_parameters()}

    moved = probe(model, [batch], read, steps=3, lr=0.1)
    assert all(change > 0.05 for change in moved.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_a_probe_is_the_plain_fine_tune() -> None:
    model, batch = FAMILIES["llama"]()
    name = "model.layers.0.mlp.up_proj.weight"
    found = probe(model, [batch], lambda old: model.get_parameter(name).clone(), steps=3, lr=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert torch.allclose(found, model.get_parameter(name), atol=1e-6)


def test_a_probe_that_fails_restores_the_base() -> None:
    model = Noisy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = {"x": torch.randn(8, 4), "labels": torch.ones(8, 1)}
    with pytest.raises(RuntimeError):
        probe(model, [good, {"x": torch.randn(8, 5), "labels": torch.ones(8, 1)}], len, steps=2, lr=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
