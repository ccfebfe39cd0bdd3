"""A change enters every kind of layer the same way: through `out x in`, and nothing else of the layer changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltaworks as dw
from deltaworks.core.part import Module
from deltaworks.model.weights import Weight
from tests.families import FAMILIES


class Tower(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.picture = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.grouped = nn.Conv1d(8, 8, 3, groups=4, padding=1)
        self.fused = Conv1D(12, 8)
        self.last = nn.Linear(12, 5)

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        seen = self.picture(image).flatten(2).transpose(1, 2)
        x = self.words(ids) + seen[:, : ids.shape[1]]
        x = self.grouped(x.transpose(1, 2)).transpose(1, 2).contiguous()
        return self.last(self.fused(x).tanh())


class Reader(nn.Module):
    """Uses its layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.read.weight.T + self.read.bias


def tower() -> tuple[Tower, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = Tower().double()
    return model, (torch.randint(1, 11, (2, 4)), torch.randn(2, 3, 6, 6, dtype=torch.float64))


def moved(tuned: dw.Tuned) -> dw.Tuned:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tuned


LAYERS = ["words", "picture", "grouped", "fused", "last"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", [dw.LoRA(rank=2), dw.PiSSA(rank=2), dw.DoRA(rank=2)], ids=lambda m: m.slug)
def test_the_side_path_of_every_layer_equals_the_dense_weight(layer: str, method) -> None:
    model, inputs = tower()
    base = model(*inputs)
    tuned = moved(dw.attach(model, type(method)(rank=2, on=[layer])))
    beside = model(*inputs)
    assert not torch.allclose(beside, base)
    plain = copy.deepcopy(dw.detach(copy.deepcopy(model)))
    ((_, part),) = tuned.named_parts()
    view = Weight(plain.get_submodule(layer))
    with torch.no_grad():
        plain.get_submodule(layer).weight.copy_(view.layout(part.fold(view.matrix())))
    assert torch.allclose(beside, plain(*inputs), atol=1e-10)
    dw.merge(model)
    assert torch.allclose(model(*inputs), beside, atol=1e-10)
    dw.detach(model)
    assert torch.equal(model(*inputs), base)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_every_layer_are_derivatives(layer: str) -> None:
    model, inputs = tower()
    tuned = moved(dw.attach(model, dw.LoRA(rank=2, on=[layer])))
    parameters = tuned.parameters()

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        return model(*inputs)

    assert torch.autograd.gradcheck(value, tuple(parameters), atol=1e-6)


def test_padding_rows_of_an_embedding_follow_the_delta_as_the_merged_weight_does() -> None:
    model, (ids, image) = tower()
    moved(dw.attach(model, dw.LoRA(rank=2, on=["words"])))
    ids[:, 0] = 0
    beside = model(ids, image)
    assert torch.allclose(dw.merge(model)(ids, image), beside, atol=1e-10)


def test_a_model_nobody_has_heard_of_is_addressed_by_name_and_type() -> None:
    model, _ = tower()
    tuned = dw.attach(model, dw.LoRA(rank=2, on=nn.Linear))
    assert [name for name, _ in tuned.named_parts()] == ["last.weight"]
    dw.detach(model)
    tuned = dw.attach(model, dw.LoRA(rank=2, on=["las.", "fused"]))
    assert [name for name, _ in tuned.named_parts()] == ["fused.weight", "last.weight"]
    dw.detach(model)
    with pytest.raises(ValueError, match=r"attention\.query"):
        dw.attach(model, dw.LoRA(on="attention.query"))
    assert type(model.last) is nn.Linear


def test_a_weight_that_is_read_without_a_call_is_changed_all_the_same() -> None:
    from deltaworks.core.attach import install
    from deltaworks.core.method import Placed
    from deltaworks.model.anatomy import Site

    torch.manual_seed(0)
    model, x = Reader(), torch.randn(2, 4)
    base = model(x)
    method = dw.LoRA(rank=2)
    site = Site("read", None, "linear", called=False)
    tuned = moved(install(model, method, [Placed(site, method.delta(Weight(model.read)), "weight")], {}))
    changed = model(x)
    assert not torch.equal(changed, base)
    assert "read.weight" in model.state_dict() and torch.equal(pickle.loads(pickle.dumps(model))(x), changed)
    changed.sum().backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters())
    assert torch.allclose(dw.merge(model)(x), changed, atol=1e-6)
    dw.detach(model)
    assert torch.equal(model(x), base)


def test_tied_weights_stay_tied_and_are_not_merged_on_one_side_unasked() -> None:
    from tests.families import FAMILIES

    model, batch = FAMILIES["gpt2"]()
    assert model.lm_head.weight is model.transformer.wte.weight
    moved(dw.attach(model, dw.LoRA(rank=2, on=["lm_head"])))
    beside = model(**batch).logits
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(ValueError, match="tied"):
        dw.merge(model)
    dw.merge(model, untie=True)
    assert torch.allclose(model(**batch).logits, beside, atol=1e-5)
    dw.detach(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_examples_of_one_batch_can_have_different_adapters() -> None:
    from tests.families import FAMILIES

    model, batch = FAMILIES["llama"]()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    base = model(**inputs).logits
    alone = {}
    for seed, name in enumerate("ab"):
        moved(dw.attach(model, dw.LoRA(rank=2) if name == "a" else dw.DoRA(rank=3), name=name, seed=seed))
        dw.activate(model, name)
        alone[name] = model(**inputs).logits
    dw.activate(model, None)
    with dw.route(model, ["b", "a"]):
        mixed = model(**inputs).logits
    assert torch.allclose(mixed[0], alone["b"][0], atol=1e-5) and torch.allclose(mixed[1], alone["a"][1], atol=1e-5)
    with dw.route(model, [None, "a"]):
        mixed = model(**inputs).logits
    assert torch.allclose(mixed[0], base[0], atol=1e-6)
    with pytest.raises(ValueError, match="one adapter name per example"), dw.route(model, ["a"]):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, base)


def test_low_rank_changes_of_a_batch_are_added_beside_one_product() -> None:
    layers: list[Any] = [torch.nn.Linear(6, 9), torch.nn.Linear(9, 4, bias=False)]
    model = torch.nn.Sequential(*layers).double().requires_grad_(False)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    alone: dict[str | None, torch.Tensor] = {None: model(x)}
    methods = {"a": dw.LoRA(rank=2, on="all"), "b": dw.PiSSA(rank=3, on="all"), "c": dw.LoRA(rank=4, on=["0"])}
    for name, method in methods.items():
        moved(dw.attach(model, method, name=name))
        dw.activate(model, name)
        alone[name] = model(x)
    calls: list[tuple[int, ...]] = []
    with mock.patch.object(torch.nn.functional, "linear", wraps=torch.nn.functional.linear) as product:
        for routing in (["b", "a", None, "b"], ["c", "a", "b", "a"], [None, None, None, "c"]):
            with torch.no_grad(), dw.route(model, routing):
                mixed = model(x)
            calls.append(tuple(call.args[0].shape[0] for call in product.call_args_list))
            product.reset_mock()
            for row, name in enumerate(routing):
                assert torch.allclose(mixed[row], alone[name][row])
    assert calls == [(4, 4)] * 3


def test_new_names_are_checked() -> None:
    model, _ = tower()
    for wrong in ("", "a b", "forward", "1st", "a.b"):
        with pytest.raises(ValueError, match="cannot be called"):
            dw.attach(model, dw.LoRA(on=["last"]), name=wrong)
    dw.attach(model, dw.LoRA(on=["last"]))
    with pytest.raises(ValueError, match="already has an adapter"):
        dw.attach(model, dw.LoRA(on=["last"]))
    with pytest.raises(ValueError, match="it has default"):
        dw.activate(model, "other")


def test_dropout_that_cannot_act_is_told() -> None:
    import warnings

    from tests.families import FAMILIES

    model, _ = FAMILIES["mixtral"]()
    with pytest.warns(UserWarning, match="dropout does not act at 4 places"):
        dw.attach(model, dw.LoRA(rank=2, dropout=0.1))
    dw.detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dw.attach(model, dw.LoRA(rank=2, dropout=0.1, on="attention"))


def test_an_adapted_model_compiles_to_one_graph() -> None:
    from tests.families import FAMILIES

    torch._dynamo.reset()
    model, batch = FAMILIES["llama"]()
    moved(dw.attach(model, dw.LoRA(rank=2)))
    expected = model(**batch).logits
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(**batch).logits, expected, atol=1e-5)


def test_a_baked_model_whose_head_was_untied_says_so_in_its_configuration() -> None:
    from tests.families import FAMILIES

    model, batch = FAMILIES["gpt2"]()
    moved(dw.attach(model, dw.LoRA(rank=2, on=["lm_head"])))
    beside = model(**batch).logits
    dw.bake(model, untie=True)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert torch.allclose(model(**batch).logits, beside, atol=1e-5)


def test_an_example_s_adapter_may_change_a_layer_s_input_and_its_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    x = torch.randn(2, 6).double()
    moved(dw.attach(model, dw.LoRA(rank=2, on="all"), name="one"))
    graft = model[0].deltaworks

    class Doubled(Module):
        def input(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    graft.add("one", "doubled", Doubled())
    alone = model(x)
    with dw.disable(model):
        base = model(x)
    with dw.route(model, ["one", None]):
        mixed = model(x)
    assert torch.allclose(mixed, torch.stack([alone[0], base[1]]))


def test_a_rank_called_inner_is_no_dropout_of_a_stack() -> None:
    tuned = dw.attach(FAMILIES["mixtral"]()[0], dw.LoRASP(rank=2, dropout=0.0, on="expert.down"), seed=0)
    assert list(tuned.parts())
