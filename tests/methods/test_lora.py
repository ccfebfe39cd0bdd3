"""LoRA, its stable scaling and its second learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part, saved_shapes, steps


def test_the_change_has_at_most_the_rank() -> None:
    model, _ = net()
    tuned = attach(model, dw.LoRA, rank=3)
    nudge(tuned)
    assert torch.linalg.matrix_rank(part(tuned).dense()) == 3


def test_after_the_first_step_only_b_has_moved() -> None:
    model, x = net()
    tuned = attach(model, dw.LoRA, rank=3)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    list(steps(model, x, tuned, 1))
    for name, p in tuned.named_parameters():
        assert torch.equal(p, before[name]) == name.endswith(".a"), name


def test_alpha_scales_the_change_linearly() -> None:
    changes = []
    for alpha in (4.0, 12.0):
        model, _ = net()
        tuned = attach(model, dw.LoRA, rank=4, alpha=alpha)
        nudge(tuned)
        changes.append(part(tuned).dense())
    assert torch.allclose(changes[1], 3 * changes[0])


def test_dropout_acts_in_training_only_and_on_the_branch_only() -> None:
    model, x = net()
    tuned = attach(model, dw.LoRA, rank=8, dropout=0.5)
    nudge(tuned, 0.5)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        for p in tuned.parameters():
            p.zero_()
    with dw.disable(model):
        base = model(x)
    assert torch.equal(model(x), base)


def test_dropout_keeps_the_mean_and_its_gradient_matches_its_mask() -> None:
    model, _ = net()
    tuned = attach(model, dw.LoRA, rank=2, alpha=2.0, dropout=0.25)
    nudge(tuned, 0.5)
    model.train()
    x = torch.ones(20_000, 12, dtype=torch.float64)
    with dw.disable(model):
        base = model.first(x[:1])
    expected = x[:1] @ part(tuned).dense().T
    assert torch.allclose((model.first(x) - base).mean(0, keepdim=True), expected, atol=0.05)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return model.first(x)

    assert torch.autograd.gradcheck(call, (x,))


def test_training_keeps_the_input_and_a_narrow_product_only() -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.LoRA, rank=1)
    x.requires_grad_()
    assert sorted(saved_shapes(lambda: model.first(x))) == [(2, 5, 12), (10, 1)]


def test_dropout_adds_one_byte_for_every_input_feature() -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.LoRA, rank=1, dropout=0.5)
    model.train()
    x.requires_grad_()
    assert sorted(saved_shapes(lambda: model.first(x))) == [(2, 5, 12), (2, 5, 12), (10, 1)]


def test_stable_scaling_halves_when_the_rank_is_quadrupled() -> None:
    assert dw.LoRA(rank=32, rslora=True).scale / dw.LoRA(rank=8, rslora=True).scale == 0.5
    assert dw.LoRA(rank=32).scale / dw.LoRA(rank=8).scale == 0.25
    assert dw.LoRA(rank=1, rslora=True).scale == dw.LoRA(rank=1).scale


def test_stable_scaling_survives_the_file(tmp_path) -> None:
    model, x = net()
    nudge(attach(model, dw.LoRA, rank=4, rslora=True))
    dw.save(model, tmp_path / "adapter")
    twin, _ = net()
    dw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(x), model(x))


def test_one_gradient_step_moves_the_stable_branch_by_as_much_at_any_rank() -> None:
    def step(rank: int, rslora: bool, seed: int) -> float:
        torch.manual_seed(seed)
        layer = nn.Sequential(nn.Linear(512, 64, bias=False))
        x, g = torch.randn(1, 512), torch.randn(1, 64)
        tuned = attach(layer, dw.LoRA, seed=seed + 100, rank=rank, alpha=16.0, rslora=rslora)
        base = layer(x)
        (base * g).sum().backward()
        with torch.no_grad():
            for p in tuned.parameters():
                p.sub_(p.grad, alpha=1e-3)
            return float((layer(x) - base).norm())

    def moved(rank: int, rslora: bool) -> float:
        return sum(step(rank, rslora, seed) for seed in range(8))

    assert 0.75 < moved(512, True) / moved(32, True) < 1.33
    assert 0.75 < 16 * moved(512, False) / moved(32, False) < 1.33


def test_lora_plus_gives_b_its_multiple_of_the_rate_and_every_tensor_one_group() -> None:
    model, _ = net()
    tuned = attach(model, dw.LoRA, rank=2, b_lr_ratio=16.0)
    groups = tuned.parameter_groups(1e-3)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert {name: rate / 1e-3 for name, rate in rates.items()} == {
        name: 16.0 if name.endswith(".b") else 1.0 for name, _ in tuned.named_parameters()
    }
    assert sum(len(group["params"]) for group in groups) == len(tuned.parameters())


def test_the_ratio_outlasts_a_scheduler() -> None:
    model, _ = net()
    groups = attach(model, dw.LoRA, rank=2, b_lr_ratio=16.0).parameter_groups(1e-3)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(7):
        optimizer.step()
        schedule.step()
        slow, fast = sorted(group["lr"] for group in optimizer.param_groups)
        assert abs(fast / slow - 16) < 1e-9


def test_lora_plus_at_a_ratio_of_one_trains_bit_for_bit_as_lora() -> None:
    def trained(method: type, **settings: float) -> list[torch.Tensor]:
        model, x = net()
        tuned = attach(model, method, rank=2, **settings)
        list(steps(model, x, tuned, 5))
        return [p.detach().clone() for p in tuned.parameters()]

    plain, one, sixteen = trained(dw.LoRA), trained(dw.LoRAPlus, b_lr_ratio=1.0), trained(dw.LoRAPlus)
    assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, sixteen, strict=True))


def test_overrides_reach_the_optimizer_s_groups() -> None:
    from tests.families import FAMILIES

    model, _ = FAMILIES["llama"]()
    method = dw.LoRA(rank=2, on=["attention.query", "attention.value"], overrides={"q_proj": {"b_lr_ratio": 4.0}})
    groups = dw.attach(model, method).parameter_groups(1.0)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert {rate for name, rate in rates.items() if "q_proj" in name and name.endswith(".b")} == {4.0}
    assert {rate for name, rate in rates.items() if "v_proj" in name or name.endswith(".a")} == {1.0}


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("tokens", [1, 40])
def test_reading_without_gradients_gives_what_training_reads(rank: int, tokens: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(16, 24)).bfloat16().requires_grad_(False)
    tuned = dw.attach(layer, dw.LoRA(rank=rank, on="all"))
    part = next(iter(tuned.parts()))
    torch.nn.init.normal_(part.b)
    x = torch.randn(1, tokens, 16).bfloat16()
    exact = layer[0].weight.float() + part.dense()
    with torch.no_grad():
        read = layer(x)
        wanted = x.float() @ exact.T + layer[0].bias.float()
    assert read.shape == (1, tokens, 24)
    assert (read - wanted).norm() < 1.5e-2 * wanted.norm()
    assert (read - layer(x)).norm() < 1.5e-2 * wanted.norm()
