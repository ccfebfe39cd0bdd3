"""What LayerNorm tuning must hold: the feed-forward part's norm alone, or its most informative entries."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import deltaworks as dw
from deltaworks.statistics import fisher
from tests.families import FAMILIES


def test_only_the_norm_after_the_feed_forward_part_changes() -> None:
    model, batch = FAMILIES["bert"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = dw.attach(model, dw.LayerNorm())
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2, weight_decay=0.1))
    model(**batch).loss.backward()
    optimizer.step()
    dw.bake(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    layers = [f"bert.encoder.layer.{i}.output.LayerNorm.{p}" for i in (0, 1) for p in ("weight", "bias")]
    assert changed == set(layers)


def test_the_number_of_values_is_the_papers() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16))
    assert sum(p.numel() for p in dw.attach(model, dw.LayerNorm()).parameters()) == 49_152
    dw.detach(model)
    assert sum(p.numel() for p in dw.attach(model, dw.LayerNorm(on="norm")).parameters()) == 100_352


def test_a_norm_without_shift_trains_its_scale() -> None:
    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.LayerNorm(on="norm"))
    assert [part.site.parameter for part in tuned.parts()] == ["weight"] * 5


@pytest.mark.parametrize(("family", "name"), [("mamba", "norm"), ("falcon", "input_layernorm")])
def test_a_block_with_a_single_norm_trains_that(family: str, name: str) -> None:
    model, _ = FAMILIES[family]()
    assert {part.site.path.rpartition(".")[2] for part in dw.attach(model, dw.LayerNorm()).parts()} == {name}


def test_fisher_keeps_exactly_its_share_and_the_largest() -> None:
    model, batch = FAMILIES["bert_classification"]()
    batches = [batch]
    names = [f"{s}.{p}" for s, m in model.named_modules() if s.endswith("output.LayerNorm") for p in ("weight", "bias")]
    names = [name for name in names if "attention" not in name]
    scores = torch.cat([fisher(model, [name], batches)[name] for name in names])
    tuned = dw.attach(model, dw.LayerNorm(share=0.2), data=batches)
    count = round(0.2 * len(scores))
    assert sum(p.numel() for p in tuned.parameters()) == count
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    for part in tuned.parts():
        start = 32 * names.index(f"{part.site.path}.{part.site.parameter}")
        chosen[start + part.index] = True
    assert torch.equal(chosen.nonzero().flatten(), scores.topk(count).indices.sort().values)
    magnitude = torch.cat([model.get_parameter(name).detach().abs() for name in names])
    assert set(chosen.nonzero().flatten().tolist()) != set(magnitude.topk(count).indices.tolist())


def test_only_the_chosen_entries_change_also_when_merged() -> None:
    model, batch = FAMILIES["bert_classification"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = dw.attach(model, dw.LayerNorm(share=0.1), data=[batch])
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.fill_(0.5)
    count = sum(p.numel() for p in tuned.parameters())
    dw.bake(model)
    assert sum(int((value != before[name]).sum()) for name, value in model.state_dict().items()) == count


def test_fisher_is_asked_for_with_data_and_a_place_that_is_no_norm_is_named() -> None:
    model, _ = FAMILIES["bert"]()
    with pytest.raises(ValueError, match="give batches"):
        dw.attach(model, dw.LayerNorm(share=0.5))
    with pytest.raises(ValueError, match="query is no norm"):
        dw.attach(model, dw.LayerNorm(on="attention.query"))
