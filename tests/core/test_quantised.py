"""Every weight method works beside a quantised base: its own formats, one layer's values at a time."""

from __future__ import annotations

import copy

import pytest
import torch

import deltaworks as dw
from deltaworks.core.method import WeightMethod
from deltaworks.model.anatomy import describe
from deltaworks.model.loading import load_base
from deltaworks.model.weights import Weight, is_quantised
from tests.families import FAMILIES

KINDS = ("int8", "int4", "nf4")
SLUGS = [slug for slug, cls in dw.methods().items() if issubclass(cls, WeightMethod)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small Llama on disk, with layers wide enough for groups of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def quantised(request, saved):
    return load_base(saved, quantize=request.param)


def batch():
    _, inputs = FAMILIES["llama"]()
    return inputs


@pytest.mark.parametrize("slug", SLUGS)
def test_it_trains_beside_packed_weights_that_stay_as_they_are(slug: str, quantised) -> None:
    model, inputs = quantised, batch()
    packed = [p for p in model.parameters() if is_quantised(p)]
    assert packed
    site = describe(model).select("mlp.up")[0]
    values = Weight(model.get_submodule(site.path)).matrix().clone()
    base = model(**inputs).logits
    method = dw.method(slug)
    tuned = dw.attach(model, method, data=[inputs, inputs] if method.needs_data else None, seed=0)
    try:
        start = model(**inputs).logits
        scale = base.abs().max()
        # Quantised kernels round, so how far others move at the start is tested on ordinary weights only.
        assert (start - base).abs().max() <= 0.02 * scale or not method.exact_at_start
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model(**inputs).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters())
        assert all(p.grad is None for p in packed)
        sites = [part.site for part in tuned.parts() if part.site.parameter]
        changed = [site for site in sites if is_quantised(model.get_submodule(site.path).weight)]
        if changed:
            with pytest.raises(ValueError, match="quantised" if method.mergeable else slug):
                dw.merge(model)
    finally:
        dw.detach(model)
    assert torch.equal(model(**inputs).logits, base)
    assert torch.equal(Weight(model.get_submodule(site.path)).matrix(), values)


def test_the_change_is_that_of_the_dequantised_model(quantised) -> None:
    model, inputs = quantised, batch()
    plain, _ = FAMILIES["llama"]()
    plain = type(plain)(copy.deepcopy(model.config))
    with torch.no_grad():
        for name, module in model.named_modules():
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    view = Weight(module, key)
                    plain.get_submodule(name)._parameters[key].copy_(view.layout(view.matrix()))
    plain.eval()
    outputs = []
    for each in (model, plain):
        tuned = dw.attach(each, dw.DoRA(rank=2), seed=0)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        outputs.append(each(**inputs).logits)
        dw.detach(each)
    # bitsandbytes and torchao multiply in their own precision.
    assert (outputs[0] - outputs[1]).abs().max() <= 0.05 * outputs[1].abs().max()


def test_base_weights_that_are_quantised_cannot_be_trained_themselves(quantised) -> None:
    with pytest.raises(ValueError, match="lora"):
        dw.attach(quantised, dw.method("full"))
    assert not [name for name in quantised.state_dict() if "deltaworks" in name]


def test_a_base_that_bitsandbytes_repacked_for_inference_trains_all_the_same(saved) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packed = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=packed).eval()
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs).logits
    tuned = dw.attach(model, dw.LoRA(rank=2), seed=0)
    assert (model(**inputs).logits - before).abs().max() <= 0.05 * before.abs().max()
    model(**inputs).loss.backward()
    grads = [parameter.grad for name, parameter in tuned.named_parameters() if name.endswith(".b")]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_no_unpacked_weight_is_kept_for_backward(quantised) -> None:
    model = copy.deepcopy(quantised)
    tuned = dw.attach(model, dw.LoRA(rank=2))
    shapes = {tuple(Weight(model.get_submodule(part.site.path)).shape) for part in tuned.parts()}
    own = {parameter.data_ptr() for parameter in model.parameters() if not is_quantised(parameter)}
    unpacked: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shape = tuple(tensor.shape)
        if {shape, shape[::-1]} & shapes and not is_quantised(tensor) and tensor.data_ptr() not in own:
            unpacked.append(shape)
        return tensor

    inputs = {name: value.repeat(5, 1) for name, value in batch().items()}  # no activation has a weight's shape
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    assert not unpacked
    assert all(parameter.grad is not None for parameter in tuned.parameters())
