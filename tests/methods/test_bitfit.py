"""What BitFit must hold: only vectors move, and their number is the paper's."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import deltaworks as dw
from tests.families import FAMILIES


def trained(tuned: dw.Tuned, steps: int = 3) -> dw.Tuned:
    """A few AdamW steps with decay on the model's own batch."""
    _, batch = FAMILIES["bert"]()
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2, weight_decay=0.1))
    for _ in range(steps):
        tuned.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned


def test_no_matrix_changes_and_every_encoder_bias_does() -> None:
    model, _ = FAMILIES["bert"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(dw.attach(model, dw.BitFit()))
    dw.bake(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("bert.") and name.endswith(".bias")}


def test_bert_base_trains_the_papers_number_of_values() -> None:
    with torch.device("meta"):
        model = hf.BertForSequenceClassification(hf.BertConfig())
    tuned = dw.attach(model, dw.BitFit())
    per_layer = sum(p.numel() for name, p in tuned.named_parameters() if ".layer.0." in name)
    assert (per_layer, sum(p.numel() for p in tuned.parameters())) == (8448, 102_912)


def test_the_papers_half_is_queries_and_intermediates() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    half = dw.attach(model, dw.BitFit(on=["attention.query", "mlp.up"], norms=False))
    assert sum(p.numel() for p in half.parameters()) == 46_080
    assert {path.rsplit(".", 2)[-2] for path, _ in half.named_parts()} == {"dense", "query"}
    assert not any("output" in path for path, _ in half.named_parts())


def test_a_key_bias_gets_no_gradient_where_positions_are_absolute() -> None:
    model, batch = FAMILIES["bert"]()
    tuned = dw.attach(model.double(), dw.BitFit())
    model(**batch).loss.backward()
    sizes = {name: p.grad.abs().max().item() for name, p in tuned.named_parameters() if p.grad is not None}
    keys = [size for name, size in sizes.items() if ".key." in name]
    assert keys and max(keys) < 1e-12 < 1e-6 < min(size for name, size in sizes.items() if ".query." in name)


def test_a_base_without_biases_gets_them_and_merging_writes_them() -> None:
    model, batch = FAMILIES["llama"]()
    base = model(**batch).logits
    tuned = dw.attach(model, dw.BitFit())
    assert torch.equal(model(**batch).logits, base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.normal_()
    beside = model(**batch).logits
    dw.merge(model)
    assert model.model.layers[0].mlp.up_proj.bias.shape == (48,)
    assert torch.equal(model(**batch).logits, beside)
    dw.detach(model)
    assert model.model.layers[0].mlp.up_proj.bias is None
    assert torch.equal(model(**batch).logits, base)


def test_some_biases_missing_are_left_missing_unless_asked_for() -> None:
    model, _ = FAMILIES["qwen2"]()
    tuned = dw.attach(model, dw.BitFit())
    assert {path.split(".")[-2] for path, _ in tuned.named_parts()} == {"q_proj", "k_proj", "v_proj"}
    dw.detach(model)
    assert any("down_proj" in path for path, _ in dw.attach(model, dw.BitFit(create=True)).named_parts())
    dw.detach(model)
    with pytest.raises(ValueError, match="bitfit found nothing"):
        dw.attach(model, dw.BitFit(on="mlp", create=False))


def test_a_bias_of_a_part_of_a_fused_layer_touches_that_part_only() -> None:
    model, batch = FAMILIES["phi3"]()
    layer = model.model.layers[0].self_attn.qkv_proj
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    tuned = dw.attach(model, dw.BitFit(on="attention.value", norms=False))
    model(**batch)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.fill_(1.0)
    model(**batch)
    change = (seen[1] - seen[0]).reshape(-1, seen[0].shape[-1])
    assert torch.allclose(change[:, -16:], torch.ones(1), atol=1e-6) and not change[:, :-16].any()
    dw.merge(model)
    model(**batch)
    assert torch.allclose(seen[2], seen[1], atol=1e-6)


def test_the_backward_pass_keeps_no_input_of_a_linear_layer() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    dw.attach(layer, dw.BitFit(on="[01]"))
    saved: list[tuple[int, ...]] = []
    x = torch.randn(500, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        layer(x)
    assert (500, 64) not in saved


def test_the_file_holds_little_more_than_the_values(tmp_path) -> None:
    model, _ = FAMILIES["bert"]()
    tuned = dw.attach(model, dw.BitFit())
    dw.save(model, tmp_path)
    size = sum(p.numel() for p in tuned.parameters())
    stored = dw.load(FAMILIES["bert"]()[0], tmp_path).summary().stored_bytes
    assert stored == 4 * size
