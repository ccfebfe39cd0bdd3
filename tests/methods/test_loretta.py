"""LoRETTA: maps and low-rank factors as tensor trains."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf

import deltaworks as dw
from deltaworks.core.operators.offset import Offset
from deltaworks.core.operators.tensor_train import (
    OFFICIAL,
    TrainBottleneck,
    TrainLowRank,
    TrainWeight,
    axes,
    contracted,
    cores,
    size,
)
from deltaworks.model.anatomy import describe
from deltaworks.model.weights import Weight
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part, steps


def test_axes_multiply_to_the_map_and_the_authors_are_known() -> None:
    for (width, narrow), shape in OFFICIAL.items():
        assert math.prod(shape) == width * narrow and axes(width, narrow) == shape
    for width, narrow in ((32, 8), (48, 64), (17, 3), (1, 1), (2048, 8)):
        shape = axes(width, narrow)
        assert math.prod(shape) == width * narrow and all(k <= 17 for k in shape)
    assert size((8, 8, 12, 8), 5) == 580 and size((8, 8, 12, 8, 8), 5) == 780


def test_every_unfolding_of_a_train_has_its_rank() -> None:
    torch.manual_seed(0)
    shape = (4, 6, 5, 4)
    train = [core.detach().double() for core in cores(shape, 3, 100)]
    whole = torch.einsum("aib,bjc,ckd,dle->aijkle", *train).reshape(shape)
    assert torch.allclose(contracted(train, 24), whole.reshape(24, 20))
    for cut in range(1, 4):
        unfolded = whole.reshape(math.prod(shape[:cut]), -1)
        assert torch.linalg.matrix_rank(unfolded, atol=1e-9) <= 3


def test_fresh_maps_have_the_wanted_deviation_on_average() -> None:
    torch.manual_seed(0)
    variance = torch.stack([contracted(list(cores((8, 8, 12, 8), 5, 776)), 768).var() for _ in range(100)]).mean()
    assert abs(variance.sqrt() * math.sqrt(776) - 1) < 0.1


def test_the_methods_give_fresh_maps_the_sizes_of_their_layers() -> None:
    torch.manual_seed(0)
    weight, base = Weight(torch.nn.Linear(24, 40)), describe(FAMILIES["llama"]()[0])
    rep = dw.LoRETTARep(rank=24, train_rank=8, start="random")
    adp = dw.LoRETTAAdp(bottleneck=16, train_rank=8, start="random", norms=False)
    totals, squares = (24 + 24, 24 + 40, 32 + 16, 32 + 16), torch.zeros(4)
    for _ in range(400):
        maps = (*rep.delta(weight).factors(), *next(adp.parts(base, {}, None)).part.maps())
        squares += torch.stack([m.detach().square().mean() for m in maps]) / 400
    assert ((squares * torch.tensor(totals)).sqrt() - 1).abs().max() < 0.06


@pytest.mark.parametrize("start", ["subtracted", "random"])
def test_the_low_rank_form_starts_as_it_says_and_every_core_learns(start: str) -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.LoRETTARep, rank=4, train_rank=2, start=start)
    assert torch.allclose(model(x), base, atol=1e-14) == (start == "subtracted")
    model(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in tuned.parameters())
    tuned_count = sum(p.numel() for p in part(tuned).parameters() if p.requires_grad)
    assert tuned_count == size(axes(12, 4), 2) + size(axes(8, 4), 2)


@pytest.mark.parametrize(("start", "rank"), [("random", 3), ("subtracted", 6)])
def test_the_rank_is_that_of_the_factors(start: str, rank: int) -> None:
    tuned = attach(net(12, 8, 6)[0], dw.LoRETTARep, rank=3, start=start)
    nudge(tuned, 1.0)
    assert torch.linalg.matrix_rank(part(tuned).dense()) == rank


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_all_norms_train_beside_it(family: str) -> None:
    model, _ = FAMILIES[family]()
    own = {name for name, _ in model.named_parameters()}
    norms = {name for name in own if "norm" in name.lower()}
    tuned = dw.attach(model, dw.LoRETTARep(), also="norm", seed=0)
    assert len(norms) >= 5 and {name for name, _ in tuned.named_parameters()} & own == norms


def test_the_change_is_that_of_the_trains_of_low_rank_and_merges() -> None:
    model, x = net(12, 8, 6)
    weight, bias = model.first.weight.detach().clone(), model.first.bias
    tuned = attach(model, dw.LoRETTARep, rank=2, train_rank=2, alpha=3.0)
    before = part(tuned).factors()
    list(steps(model, x, tuned, 3))
    delta = part(tuned)
    assert torch.equal(before[0][2:], delta.factors()[0][2:])
    a, b = (contracted(list(train), rows) for train, rows in ((delta.a, 12), (delta.b, 2)))
    a0, b0 = (contracted(list(train), rows) for train, rows in ((delta.a0, 12), (delta.b0, 2)))
    assert torch.allclose(delta.dense(), 1.5 * (a @ b - a0 @ b0).T)
    assert torch.linalg.matrix_rank(delta.dense()) <= 4
    assert torch.allclose(model.first(x), x @ (weight + delta.dense()).T + bias)
    nudge(tuned)
    beside = model(x)
    dw.merge(model)
    assert torch.allclose(model(x), beside)


@pytest.mark.parametrize("place", ["outputs", "mlp"])
def test_the_adapter_adds_its_bottleneck_and_trains_the_norms(place: str) -> None:
    model, batch = FAMILIES["llama"]()
    base = model(**batch).logits
    tuned = dw.attach(model, dw.LoRETTAAdp(bottleneck=8, train_rank=2, place=place, activation="tanh"), seed=0)
    assert torch.equal(model(**batch).logits, base)
    adapters = {name: p for name, p in tuned.named_parts() if isinstance(p, TrainBottleneck)}
    assert len(adapters) == 4
    norms = {id(m) for m in model.modules() if "Norm" in type(m).__name__}
    offsets = [p for p in tuned.parts() if isinstance(p, Offset)]
    assert len(offsets) == len(norms) and all(
        offset.get_parameter(n).requires_grad for offset in offsets for n, _ in offset.named_parameters()
    )
    nudge(tuned)
    for adapter in adapters.values():
        assert sum(p.numel() for p in adapter.parameters()) == 2 * size(axes(32, 8), 2) + 8 + 32
        h = torch.randn(3, 32)
        down, up = adapter.maps()
        expected = h + torch.tanh(h @ down + adapter.down_bias) @ up + adapter.up_bias
        changed = adapter.input(h) if adapter.before else adapter.output(h, h)
        assert torch.allclose(changed, expected, atol=1e-6)
    with pytest.raises(ValueError, match="loretta_adp"):
        dw.merge(model)


def test_the_authors_start_perturbs() -> None:
    model, batch = FAMILIES["llama"]()
    base = model(**batch).logits
    dw.attach(model, dw.LoRETTAAdp(start="random"), seed=0)
    assert not torch.allclose(model(**batch).logits, base, atol=1e-3)


def headed(kind: str = "Roberta", **settings) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A classifier whose new head has a dense layer, and a batch."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 3}
    config = getattr(hf, f"{kind}Config")(**shape, num_attention_heads=4, pad_token_id=0, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, f"{kind}ForSequenceClassification")(config).eval()
    return model, {"input_ids": torch.arange(5, 23).view(2, 9), "labels": torch.tensor([0, 2])}


@pytest.mark.parametrize("method", [dw.LoRETTAAdp, dw.LoRETTARep])
def test_a_train_is_the_weight_of_a_new_heads_dense_layer(method, tmp_path: Path) -> None:
    model, batch = headed()
    tuned = dw.attach(model, method(head=True, train_rank=3), also=r"classifier\.out_proj", seed=0)
    [train] = [found for found in tuned.parts() if isinstance(found, TrainWeight)]
    assert sum(p.numel() for p in train.parameters()) == size(axes(32, 32), 3) < 32 * 32
    nudge(tuned)
    dense, h = model.classifier.dense, torch.randn(3, 32)
    wanted = h @ contracted(list(train.cores), 32) + dense.bias
    assert torch.allclose(dense(h), wanted, atol=1e-6)
    model(**batch).loss.backward()
    assert all(core.grad.abs().sum() > 0 for core in train.cores)
    expected = model(**batch).logits
    dw.save(model, tmp_path / "adapter")
    fresh, _ = headed()
    fresh.classifier.dense.weight.data.normal_()  # what was there before does not count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).logits, expected)
    if method.mergeable:
        dw.merge(model)
        assert torch.allclose(dense.weight, contracted(list(train.cores), 32).T)
        assert torch.allclose(model(**batch).logits, expected, atol=1e-6)


def test_what_it_replaces_does_not_train_beside_it() -> None:
    model, _ = headed()
    tuned = dw.attach(model, dw.LoRETTAAdp(head=True), also="classifier", seed=0)
    trained = {name for name, _ in tuned.named_parts() if name.startswith("classifier")}
    assert "classifier.dense.trained_weight" not in trained
    assert {"classifier.dense.head", "classifier.dense.trained_bias", "classifier.out_proj.trained_weight"} <= trained


def test_it_takes_the_place_of_whatever_else_was_to_act_there() -> None:
    model, _ = headed("DebertaV2", pooler_hidden_size=32)
    method = dw.LoRETTARep(on=torch.nn.Linear, head=True, overrides={"pooler.dense": {"train_rank": 2}})
    tuned = dw.attach(model, method)
    at = {name: found for name, found in tuned.named_parts() if name.startswith(("pooler", "classifier"))}
    assert {name: type(found) for name, found in at.items()} == {
        "pooler.dense.head": TrainWeight, "classifier.weight": TrainLowRank,
    }  # fmt: skip
    assert at["pooler.dense.head"].train_rank == 2


def test_a_head_without_a_dense_layer_is_refused() -> None:
    for model in (headed("Bert")[0], FAMILIES["llama"]()[0]):
        with pytest.raises(ValueError, match="loretta_adp: .* no new head"):
            dw.attach(model, dw.LoRETTAAdp(head=True))
