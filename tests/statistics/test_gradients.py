"""Gradients are autograd's own, one tensor at a time, and nothing of it stays in the model."""

from __future__ import annotations

import pytest
import torch

from deltaworks.statistics import each_gradient, examples, fisher, mean_gradients, squared_gradients
from tests.families import FAMILIES

NAMES = ["bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.attention.self.query.bias"]


def batches() -> tuple[torch.nn.Module, list]:
    model, batch = FAMILIES["bert_classification"]()
    return model, [batch, {k: v.flip(0) for k, v in batch.items()} | {"labels": torch.tensor([1, 1])}]


def plain(model: torch.nn.Module, inputs: list) -> list[dict[str, torch.Tensor]]:
    made = []
    for batch in inputs:
        model.zero_grad()
        model(**batch).loss.backward()
        made.append({name: model.get_parameter(name).grad.clone() for name in NAMES})
    model.zero_grad()
    return made


def test_mean_and_squared_gradients_are_those_of_the_batches() -> None:
    model, inputs = batches()
    expected = plain(model, inputs)
    means, squares = mean_gradients(model, NAMES, inputs), squared_gradients(model, NAMES, inputs)
    for name in NAMES:
        assert torch.allclose(means[name], sum(g[name] for g in expected) / 2, atol=1e-7)
        assert torch.allclose(squares[name], sum(g[name] ** 2 for g in expected) / 2, atol=1e-9)


def test_fisher_squares_every_examples_gradient_for_itself() -> None:
    model, inputs = batches()
    singles = [one for batch in inputs for one in examples(batch)]
    assert len(singles) == 4 and all(len(one["input_ids"]) == 1 == len(one["labels"]) for one in singles)
    expected = plain(model, singles)
    measured = fisher(model, NAMES, inputs)
    for name in NAMES:
        assert torch.allclose(measured[name], sum(g[name] ** 2 for g in expected) / 4, rtol=1e-4, atol=1e-10)
        assert not torch.allclose(measured[name], squared_gradients(model, NAMES, inputs)[name], rtol=1e-2)


def test_full_gradients_never_stand_side_by_side() -> None:
    model, inputs = batches()
    names = [name for name, _ in model.named_parameters() if ".pooler" not in name]
    alive: list[int] = []
    each_gradient(model, names, inputs, lambda n, g: alive.append(sum(p.grad is not None for p in model.parameters())))
    assert len(alive) == 2 * len(names) and max(alive) == 1


def test_flags_gradients_mode_and_random_state_are_as_before() -> None:
    model, inputs = batches()
    model.train()
    model.bert.embeddings.requires_grad_(False)
    kept = torch.ones_like(model.classifier.bias)
    model.classifier.bias.grad = kept
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        fisher(model, ["bert.embeddings.word_embeddings.weight"], inputs)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.classifier.bias.grad is kept and model.training
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_tied_parameter_is_seen_once_with_its_whole_gradient() -> None:
    model, batch = FAMILIES["qwen2"]()
    seen: dict[str, torch.Tensor] = {}
    name = "model.embed_tokens.weight"
    each_gradient(model, [name, "lm_head.weight"], [batch], lambda n, g: seen.update({n: g.clone()}))
    model(**batch).loss.backward()
    assert list(seen) == [name] and torch.allclose(seen[name], model.get_parameter(name).grad)


def test_batches_without_labels_and_no_batches_are_refused_in_one_line() -> None:
    model, inputs = batches()
    with pytest.raises(ValueError, match="need batches with labels"):
        mean_gradients(model, NAMES, [{"input_ids": inputs[0]["input_ids"]}])
    with pytest.raises(ValueError, match="no batch was given"):
        mean_gradients(model, NAMES, [])
    assert all(p.requires_grad for p in model.parameters())
