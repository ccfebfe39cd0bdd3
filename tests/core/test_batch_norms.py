"""Running statistics are the base's: they stand still while anything is attached, whatever trains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import deltaworks as dw
from deltaworks import nursery


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


def pictures(channels: int = 3) -> Tensor:
    """A batch whose statistics are far from those a new norm begins with."""
    return 3 + torch.randn(8, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "deltaworks" not in name.split(".")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def trained(model: nn.Module, parameters: list[nn.Parameter], batch: Tensor, steps: int = 2) -> None:
    """A person's own loop."""
    optimizer = torch.optim.SGD(parameters, 1e-2)
    model.train()
    for _ in range(steps):
        model(pixel_values=batch)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", [dw.LoRA(rank=2, on="conv"), dw.BitFit(), dw.LayerNorm()], ids=lambda m: m.slug)
def test_a_plain_loop_in_training_mode_leaves_the_base_as_it_was(method: dw.Method) -> None:
    model = resnet()
    before = held(model)
    tuned = dw.attach(model, method, seed=0)
    trained(model, tuned.parameters(), pictures())
    adapted = model.eval()(pixel_values=pictures()).logits
    assert same(held(model), before)
    dw.detach(model)
    assert same(held(model), before)
    assert not torch.allclose(model(pixel_values=pictures()).logits, adapted)


def test_a_pre_trained_base_trains_without_moving() -> None:
    model, _ = nursery.base("conv")
    before = held(model)
    tuned = dw.attach(model, dw.LoRA(rank=2, on="conv"), seed=0)
    trained(model, tuned.parameters(), pictures(model.config.num_channels))
    assert norms(model)
    assert same(held(model), before)


def test_what_trains_is_what_acts() -> None:
    """Training and evaluation are one function where nothing is dropped."""
    model = resnet()
    dw.attach(model, dw.LoRA(rank=2, on="conv"))
    assert torch.equal(model.train()(pixel_values=pictures()).logits, model.eval()(pixel_values=pictures()).logits)


def test_norms_hear_training_mode_again_when_the_last_adapter_is_gone() -> None:
    model = resnet().eval()
    dw.attach(model, dw.LoRA(rank=2, on="conv"))
    dw.attach(model, dw.BitFit(), name="second")
    model.train()
    model.resnet.encoder.eval()
    model.resnet.encoder.stages[1].train()
    dw.detach(model, "second")
    assert not any(norm.training for norm in norms(model))
    dw.detach(model)
    quiet = set(norms(model.resnet.encoder.stages[0]))
    assert [norm.training for norm in norms(model)] == [norm not in quiet for norm in norms(model)]
    assert all(type(norm) is nn.BatchNorm2d for norm in norms(model))
    assert not any("deltaworks" in name for name, _ in model.named_modules())
    statistics = norms(model)[0].running_mean.clone()
    model.train()(pixel_values=pictures())
    assert not torch.equal(norms(model)[0].running_mean, statistics)


def test_a_baked_model_is_an_ordinary_one() -> None:
    model = resnet().train()
    dw.attach(model, dw.LoRA(rank=2, on="conv"))
    dw.bake(model)
    assert all(type(norm) is nn.BatchNorm2d and norm.training for norm in norms(model))


def _copies(model: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


def test_copies_stand_still_as_well() -> None:
    model = resnet()
    before = held(model)
    dw.attach(model, dw.LoRA(rank=2, on="conv"), seed=0)
    for other in _copies(model):
        trained(other, dw.tuned(other).parameters(), pictures())
        assert same(held(other), before)


def test_an_adapter_that_lost_its_part_at_a_norm_keeps_it_still() -> None:
    model = resnet()
    before = held(model)
    tuned = dw.attach(model, dw.BitFit())
    for name, part in list(tuned.named_parts()):
        if "normalization" in part.site.path:
            tuned.remove(name)
    trained(model, tuned.parameters(), pictures())
    assert same(held(model), before)


def test_a_compiled_model_stands_still() -> None:
    model = resnet()
    before = held(model)
    dw.attach(model, dw.LoRA(rank=2, on="conv"), seed=0)
    compiled = torch.compile(model, backend="eager")
    there = compiled.train()(pixel_values=pictures()).logits
    assert same(held(model), before)
    assert torch.allclose(there, model(pixel_values=pictures()).logits, atol=1e-6)


def test_a_norm_without_statistics_reads_its_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    dw.attach(model, dw.LoRA(rank=2, on="conv"))
    assert model.train()[1].training
    assert type(model[1]) is nn.BatchNorm2d
