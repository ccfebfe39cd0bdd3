"""What (IA)^3 must hold: scales at keys, values and inner activations, folded exactly, queries untouched."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.scaling import Scaling
from tests.families import FAMILIES


def moved(tuned: dw.Tuned, seed: int = 0) -> dw.Tuned:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return tuned


def test_bert_base_trains_the_papers_number_of_values() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    tuned = dw.attach(model, dw.IA3())
    assert sum(p.numel() for p in tuned.parameters()) == 55_296


def test_grouped_keys_and_values_have_vectors_of_their_own_width() -> None:
    model, _ = FAMILIES["llama"]()
    sizes = {part.site.role: part.l.numel() for part in dw.attach(model, dw.IA3()).parts()}
    assert sizes == {"attention.key": 16, "attention.value": 16, "mlp.down": 48}


def test_keys_values_and_inner_activations_are_scaled_and_queries_are_not() -> None:
    model, batch = FAMILIES["bert"]()
    seen: dict[str, list[torch.Tensor]] = {}
    layer = model.bert.encoder.layer[0]
    for name in ("attention.self.query", "attention.self.key", "attention.self.value"):
        layer.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: seen.setdefault(name, []).append(y.detach())
        )
    model(**batch)
    tuned = moved(dw.attach(model, dw.IA3()))
    model(**batch)
    factors = {part.site.path.removeprefix("bert.encoder.layer.0."): part.l for part in tuned.parts()}
    assert torch.equal(*seen["attention.self.query"])
    for name in ("attention.self.key", "attention.self.value"):
        before, after = seen[name]
        assert torch.allclose(after, before * factors[name], atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3", "bloom", "mixtral"])
def test_merged_is_unmerged_with_the_bias_scaled_at_outputs_only(family: str) -> None:
    model, batch = FAMILIES[family]()
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    tuned = moved(dw.attach(model, dw.IA3()))
    beside = model(**batch).logits
    parts = list(tuned.parts())
    dw.merge(model)
    assert torch.allclose(model(**batch).logits, beside, atol=1e-5)
    for part in parts:
        name = f"{part.site.path}.bias"
        if name not in biases:
            continue
        merged, base = model.get_submodule(part.site.path).bias, biases[name]
        rows = slice(None) if part.site.rows is None else list(part.site.rows)
        if part.at_input:
            assert torch.equal(merged, base)
        else:
            assert torch.allclose(merged[rows], base[rows] * part.l)


def test_a_fused_projection_keeps_its_queries() -> None:
    model, _ = FAMILIES["gpt2"]()
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    moved(dw.attach(model, dw.IA3()))
    dw.merge(model)
    after = model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(after[:, :32], before[:, :32]) and (after[:, 32:] != before[:, 32:]).all()


def test_parts_of_a_fused_projection_act_without_building_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = FAMILIES["gpt2"]()
    moved(dw.attach(model, dw.IA3()))

    def built(*_: object) -> None:
        raise AssertionError("the scaled weight was built")

    monkeypatch.setattr(Scaling, "fold", built)
    model(**batch).loss.backward()


def test_the_change_has_full_rank() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 8, dtype=torch.float64)
    change = Scaling(1 + torch.rand(8, dtype=torch.float64)).fold(weight) - weight
    assert torch.linalg.matrix_rank(change) == 8


def test_two_tasks_in_one_batch_are_two_batches() -> None:
    model, batch = FAMILIES["bert"]()
    moved(dw.attach(model, dw.IA3(), name="a"), 1)
    moved(dw.attach(model, dw.IA3(), name="b"), 2)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    dw.activate(model, "a")
    a = model(**inputs).logits
    dw.activate(model, "b")
    b = model(**inputs).logits
    with dw.route(model, ["a", "b"]):
        mixed = model(**inputs).logits
    assert torch.allclose(mixed[0], a[0], atol=1e-5) and torch.allclose(mixed[1], b[1], atol=1e-5)
    assert not torch.allclose(a[1], b[1], atol=1e-3)


def test_an_input_scaling_calls_the_layer_itself_once() -> None:
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            return super().forward(x)

    model = nn.Sequential(Counted(6, 4))
    tuned = moved(dw.attach(model, dw.IA3(on="0", inputs="0")))
    x = torch.randn(3, 6)
    y = model(x)
    (part,) = tuned.parts()
    assert len(calls) == 1 and torch.equal(calls[0], x * part.l)
    with dw.disable(model):
        assert torch.allclose(y, model(x * part.l))


def test_decay_never_pulls_the_factors_to_zero() -> None:
    model, _ = FAMILIES["llama"]()
    (group,) = dw.attach(model, dw.IA3()).parameter_groups(1e-3, weight_decay=0.1)
    assert group["weight_decay"] == 0.0


def test_stacked_with_bias_offsets_it_merges_to_what_it_was_beside() -> None:
    model, batch = FAMILIES["bert"]()
    moved(dw.attach(model, dw.IA3(), name="scales"))
    moved(dw.attach(model, dw.BitFit(), name="offsets"))
    beside = model(**batch).logits
    dw.merge(model)
    assert torch.allclose(model(**batch).logits, beside, atol=1e-5)
