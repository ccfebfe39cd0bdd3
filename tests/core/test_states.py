"""What a model goes through leaves it right: switched, frozen, copied, merged, interrupted, trained below deltas."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import deltaworks as dw
from deltaworks.core.zeroth_order import ZerothOrder
from deltaworks.training.head import head_of
from tests.families import FAMILIES


class Tied(nn.Module):
    """A word table that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.words(ids)).tanh())


class Scaled(nn.Module):
    """Embeddings that do more than look up."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Gemma3TextScaledWordEmbedding(11, 8, 0, embed_scale=3.0)
        self.places = OPTLearnedPositionalEmbedding(16, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last((self.words(ids) + self.places(torch.ones_like(ids))).tanh())


IDS = torch.tensor([[1, 5, 2], [3, 3, 7]])


def attached(model: nn.Module, method: dw.Method, **options) -> dw.Tuned:
    """The model in double precision with an adapter that has learned something."""
    tuned = dw.attach(model.double(), method, seed=0, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, part in tuned.named_parts():
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return tuned


@pytest.mark.parametrize("layer", ["words", "places"])
def test_an_embedding_that_scales_or_shifts_is_changed_as_its_merged_weight_is(layer: str) -> None:
    torch.manual_seed(0)
    model = Scaled()
    attached(model, dw.LoRA(rank=2, on=[layer]))
    beside = model(IDS)
    dw.merge(model)
    assert torch.allclose(model(IDS), beside, atol=1e-10)


def test_switching_off_a_model_that_was_merged_untied_merges_it_again() -> None:
    torch.manual_seed(0)
    model = Tied()
    attached(model, dw.LoRA(rank=2, on=["head"]))
    dw.merge(model, untie=True)
    merged = model(IDS)
    with dw.disable(model):
        assert not torch.equal(model(IDS), merged)
        with pytest.raises(ValueError, match="disable"):
            dw.merge(model)
    assert torch.equal(model(IDS), merged)


def test_what_was_frozen_trains_again_in_a_copy() -> None:
    model = Tied()
    tuned = attached(model, dw.LoRA(rank=2, on=["mid"]))
    names = [name for name, _ in tuned.named_parameters()]
    dw.core.attach.freeze(model, "default")
    other = copy.deepcopy(model)
    assert not dw.core.attach.tuned(other).parameters()
    dw.core.attach.unfreeze_adapter(other, "default")
    assert [name for name, _ in dw.core.attach.tuned(other).named_parameters()] == names


def test_a_switch_while_disabled_waits_for_its_end() -> None:
    model = Tied()
    base = model.double()(IDS)
    attached(model, dw.LoRA(rank=2, on=["mid"]), name="beside")
    dw.attach(model, dw.LoRA(rank=2, on=["head"]), name="whole", also="mid")
    with torch.no_grad():
        model.mid.weight.add_(1.0)
    dw.core.attach.activate(model, "beside")
    with dw.disable(model):
        dw.core.attach.activate(model, "whole")
        assert torch.equal(model(IDS), base)
    assert not torch.equal(model(IDS), base)
    assert torch.equal(dw.detach(model)(IDS), base)


@pytest.mark.parametrize("slug", ["dora", "loha"])
def test_a_layer_trained_under_its_delta_has_its_gradients(slug: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    method = dw.method(slug, on="mid", rank=2)
    attached(model, method, also="mid")
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    for parameter in (model.mid.weight, model.mid.bias):

        def value(_: torch.Tensor) -> torch.Tensor:
            return model.mid(x)

        if method.slug == "dora" and parameter is model.mid.weight:
            continue  # its norms are constants of the paper's gradient
        assert torch.autograd.gradcheck(value, (parameter,))


def test_a_failing_batch_leaves_a_zeroth_order_step_where_it_began() -> None:
    model = Tied()
    tuned = attached(model, dw.LoRA(rank=2, on=["mid"]))
    before = [parameter.detach().clone() for parameter in tuned.parameters()]
    rule = ZerothOrder(eps=0.5)
    run = tuned.run(1).run
    rule.attached(run)

    def fails() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rule.own_step(run, fails, 0.1)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(before, tuned.parameters(), strict=True))


@pytest.mark.parametrize("entry", ["logits_soft_cap", "output_logit_soft_cap", "z_loss_coefficient"])
def test_a_loss_that_is_more_than_the_heads_is_left_to_the_model(entry: str) -> None:
    model = Tied().requires_grad_(False)
    model.get_output_embeddings = lambda: model.head
    model.config = SimpleNamespace()
    assert head_of(model) is model.head
    setattr(model.config, entry, 30.0)
    assert head_of(model) is None


@pytest.mark.parametrize("slug", ["lora", "dora", "loha"])
def test_an_adapted_model_runs_on_the_meta_device(slug: str) -> None:
    with torch.device("meta"):
        model = Tied()
        dw.attach(model, dw.method(slug, on="mid", rank=2))
        assert model(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 11)


def test_a_failing_part_leaves_the_model_as_it_was(monkeypatch) -> None:
    from deltaworks.core.operators.low_rank import LowRank

    model, batch = FAMILIES["llama"]()
    base, classes = model(**batch).logits, [type(module) for module in model.modules()]

    def fail(self, weight) -> None:
        raise ValueError("no constants for this weight")

    monkeypatch.setattr(LowRank, "settle", fail)
    with pytest.raises(ValueError, match="no constants"):
        dw.attach(model, dw.LoRA(rank=2))
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(**batch).logits, base)


def test_what_a_detached_adapter_trained_in_place_is_frozen_again_beside_another() -> None:
    model, _ = FAMILIES["llama"]()
    dw.attach(model, dw.LoRA(rank=2), name="stays")
    dw.attach(model, dw.LoRA(rank=2), name="goes", also="head")
    assert model.lm_head.weight.requires_grad
    dw.detach(model, "goes")
    assert not model.lm_head.weight.requires_grad


def test_a_linear_layer_with_a_forward_of_its_own_is_called() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model, x = torch.nn.Sequential(Doubled(4, 3)), torch.randn(2, 4)
    base = model(x)
    dw.attach(model, dw.LoRA(rank=2, on=Doubled))
    assert torch.allclose(model(x), base)


def test_float8_weights_are_read_with_their_scales() -> None:
    from deltaworks.model.weights import Weight

    torch.manual_seed(0)
    layer, plain = torch.nn.Linear(8, 6, bias=False), torch.randn(6, 8)
    scale = plain.view(3, 2, 2, 4).abs().amax((1, 3)) / 448
    packed = plain / scale.repeat_interleave(2, 0).repeat_interleave(4, 1)
    layer.weight = torch.nn.Parameter(packed.to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = scale
    assert (Weight(layer).matrix() - plain).abs().max() <= 0.07 * plain.abs().max()
    del layer.weight_scale_inv
    with pytest.raises(ValueError, match="float8"):
        Weight(layer).matrix()


@pytest.mark.parametrize("method", [dw.VeRA(rank=2), dw.VBLoRA(rank=2, vectors=8, length=8)], ids=["vera", "vb_lora"])
def test_what_layers_share_cannot_be_on_two_devices(method: dw.Method) -> None:
    model, _ = FAMILIES["llama"]()
    model.model.layers[1].to("meta")  # stands for a second device, as device_map="auto" makes them
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"{method.slug} shares its [a-z]+ among layers on cpu and meta"):
        dw.attach(model, method)
    assert {name: type(module) for name, module in model.named_modules()} == before
    dw.attach(model, dw.LoRA(rank=2))
