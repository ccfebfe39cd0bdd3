"""What MoV must hold: the base at the start, (IA)^3 with one expert, one decision a head and a token."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import deltaworks as dw
from deltaworks.core.operators.vector_mixture import VectorMixture
from deltaworks.model.anatomy import Site
from tests.families import FAMILIES


def mixture(width: int = 8, heads: int = 2, experts: int = 3) -> VectorMixture:
    torch.manual_seed(0)
    part = VectorMixture(width, heads, experts).double()
    part.site = Site("", None, "linear", None)
    with torch.no_grad():
        part.l.normal_()
        part.router.normal_()
    return part


def test_the_output_is_the_definition_head_by_head() -> None:
    part = mixture()
    y = torch.randn(2, 5, 8, dtype=torch.float64)
    result = part.output(y, y)
    for head in range(2):
        v = y[..., 4 * head : 4 * head + 4]
        p = torch.softmax(v @ part.router, -1)
        expected = v * sum(p[..., e : e + 1] * part.l[head, e] for e in range(3))
        assert torch.allclose(result[..., 4 * head : 4 * head + 4], expected)


def test_the_recomputed_gradient_is_the_derivative_and_only_arguments_are_kept() -> None:
    part = mixture()
    y = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, *own: part.output(y, y), (y, *part.parameters()))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        part.output(y, y)
    assert sum(saved) == y.numel() + sum(p.numel() for p in part.parameters())


def test_any_router_gives_the_base_at_the_start() -> None:
    model, batch = FAMILIES["t5"]()
    base = model(**batch).logits
    tuned = dw.attach(model, dw.MoV(experts=4))
    with torch.no_grad():
        for part in tuned.parts():
            part.router.normal_(std=3.0)
    assert torch.allclose(model(**batch).logits, base, atol=1e-5)


def test_one_expert_is_ia3() -> None:
    model, batch = FAMILIES["bert"]()
    tuned = dw.attach(model, dw.MoV(experts=1))
    factors = {}
    with torch.no_grad():
        for part in tuned.parts():
            part.l.normal_(1.0, 0.2)
            factors[part.site.path] = part.l.flatten().clone()
    routed = model(**batch).logits
    dw.detach(model)
    plain = dw.attach(model, dw.IA3())
    with torch.no_grad():
        for part in plain.parts():
            part.l.copy_(factors[part.site.path])
    assert torch.allclose(model(**batch).logits, routed, atol=1e-6)


def test_two_tokens_are_scaled_differently_and_no_single_vector_will_do() -> None:
    part = mixture(heads=1)
    y = torch.randn(2, 8, dtype=torch.float64)
    factors = part.output(y, y) / y
    assert not torch.allclose(factors[0], factors[1], atol=1e-2)
    model, _ = FAMILIES["llama"]()
    dw.attach(model, dw.MoV())
    with pytest.raises(ValueError, match="mov cannot be merged"):
        dw.merge(model)


def test_counts_are_the_papers_and_the_attention_router_is_shared_by_the_heads() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig(num_hidden_layers=1, intermediate_size=768))
    tuned = dw.attach(model, dw.MoV(experts=30))
    sizes = {part.site.role: sum(p.numel() for p in part.parameters()) for part in tuned.parts()}
    assert sizes == {"attention.key": 24_960, "attention.value": 24_960, "mlp.down": 46_080}
    assert all(part.router.shape == (64, 30) for part in tuned.parts() if part.site.role != "mlp.down")


def test_grouped_and_fused_keys_are_routed_by_their_own_heads() -> None:
    model, batch = FAMILIES["phi3"]()
    tuned = dw.attach(model, dw.MoV(experts=3))
    keys = [part for part in tuned.parts() if part.site.part == "key"]
    assert keys and all(part.l.shape == (2, 3, 8) for part in keys)
    layer = model.model.layers[0].self_attn.qkv_proj
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    model(**batch)
    with torch.no_grad():
        for part in tuned.parts():
            part.l.mul_(2)
    model(**batch)
    assert torch.allclose(seen[1][..., :32], seen[0][..., :32]), "queries stay"
    assert torch.allclose(seen[1][..., 32:], 2 * seen[0][..., 32:], atol=1e-5)


def test_a_place_that_is_no_linear_layer_is_named() -> None:
    model, _ = FAMILIES["mixtral"]()
    with pytest.raises(ValueError, match="mov scales the activations of linear layers"):
        dw.attach(model, dw.MoV(on="expert.down"))
