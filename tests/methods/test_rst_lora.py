"""RST-LoRA weighs tokens in the branch alone, and is LoRA without weights."""

from __future__ import annotations

import warnings

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.weighted import Weighted, gamma_of
from deltaworks.methods.lowrank.rst_lora import aligned, importance, importance_of, overlap, spread
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part

PLAIN = {"rank": 3, "alpha": 6.0, "dropout": 0.0}


def made(**settings):
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.RSTLoRA, **(PLAIN | settings))
    nudge(tuned)
    return model, x, tuned


def test_no_weight_or_weight_zero_is_lora() -> None:
    model, x, tuned = made()
    twin, _ = net(12, 8, 6)
    nudge(attach(twin, dw.LoRA, rank=3, alpha=6.0))
    assert torch.equal(model(x), twin(x))
    with importance(tuned, torch.zeros(2, 5)):
        assert torch.allclose(model(x), twin(x), atol=1e-14)


def test_a_uniform_weight_is_a_larger_scale() -> None:
    model, x, tuned = made()
    twin, _ = net(12, 8, 6)
    nudge(attach(twin, dw.LoRA, rank=3, alpha=6.0 * 1.5))
    with importance(tuned, torch.full((2, 5), 0.5)):
        assert torch.allclose(model(x), twin(x))
    with importance(tuned, torch.full((2, 5, 4), 0.5)):
        assert torch.allclose(model(x), twin(x))


def test_every_group_of_features_has_its_weight_and_no_token_another_s() -> None:
    model, x, tuned = made()
    delta, base = part(tuned), net(12, 8, 6)[0].first
    gamma = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with importance(tuned, gamma):
        y = model.first(x)
        y.sum().backward()
    wide = gamma.repeat_interleave(3, dim=-1)[..., :12]
    assert torch.allclose(y, base(x) + ((1 + wide) * x) @ delta.dense().T)
    expected = (2.0 * delta.b.sum(0)[:, None] * ((1 + wide) * x).sum((0, 1))).detach()
    assert torch.allclose(delta.a.grad, expected)


def test_every_token_has_its_weight_and_as_many_equal_ones_are_the_same() -> None:
    model, x, tuned = made()
    delta, base = part(tuned), net(12, 8, 6)[0].first
    gamma = torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with importance(tuned, gamma):
        y = model.first(x)
    for example in range(2):
        for token in range(5):
            read = x[example, token]
            branch = 2.0 * delta.b @ (delta.a @ ((1 + gamma[example, token]) * read))
            assert torch.allclose(y[example, token], base.weight @ read + base.bias + branch)
    with importance(tuned, gamma.unsqueeze(-1).repeat(1, 1, 4)):
        assert torch.allclose(model.first(x), y, rtol=1e-12)


def test_the_base_path_never_sees_the_weights() -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.RSTLoRA, **PLAIN)
    with importance(tuned, torch.rand(2, 5)):
        assert torch.allclose(model(x), base, atol=1e-14)


def test_the_four_variants() -> None:
    p = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(0)) * 0.9
    p[range(4), range(4)] = 0
    assert torch.allclose(importance_of(p, "p_w"), p.mean(1))
    assert torch.allclose(importance_of(p, "p_wo"), p.mean((1, 2)))
    assert torch.allclose(importance_of(p, "b_w"), (p >= 0.5).float().mean(1))
    assert importance_of(p * 0.5, "b_w").abs().max() == 0 == importance_of(p * 0.5, "b_wo").abs().max()


def test_probabilities_become_binary_before_they_are_averaged() -> None:
    p = torch.zeros(3, 3, 2)
    p[0, 1], p[0, 2] = torch.tensor([0.9, 0.2]), torch.tensor([0.5, 0.4])
    p[1, 0], p[1, 2] = torch.tensor([0.1, 0.3]), torch.tensor([0.6, 0.49])
    p[2, 0], p[2, 1] = torch.tensor([0.4, 0.4]), torch.tensor([0.0, 0.3])
    assert torch.allclose(importance_of(p, "b_wo"), torch.tensor([2.0, 1.0, 0.0]) / 6)
    assert torch.allclose(importance_of(p, "b_w"), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]) / 3)


def test_tokens_take_their_units_weight_and_permuted_units_change_the_output() -> None:
    values = torch.tensor([0.1, 0.7])
    assert torch.equal(spread(values, torch.tensor([0, 0, 1, -1])), torch.tensor([0.1, 0.1, 0.7, 0.0]))
    assert spread(values[:, None].repeat(1, 3), torch.tensor([1, -1])).shape == (2, 3)
    model, x, tuned = made()
    outputs = []
    for units in ([0, 0, 1, 1, -1], [1, 1, 0, 0, -1]):
        with importance(tuned, spread(values, torch.tensor(units)).repeat(2, 1)):
            outputs.append(model(x))
    assert not torch.allclose(outputs[0], outputs[1])


def test_a_decoder_behind_an_encoder_has_none_and_generation_weighs_the_prompt() -> None:
    model, batch = FAMILIES["t5"]()
    tuned = dw.attach(model, dw.RSTLoRA(dropout=0.0), seed=0)
    reads = {("decoder" in p.site.path, p.reads) for p in tuned.parts() if isinstance(p, Weighted)}
    assert reads == {(False, True), (True, False)}
    nudge(tuned)
    with importance(tuned, torch.rand(batch["input_ids"].shape)):
        assert model(**batch).logits.isfinite().all()
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.RSTLoRA(dropout=0.0), seed=0)
    nudge(tuned, 0.3)
    prompt = batch["input_ids"][:, :5]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with importance(tuned, torch.rand(prompt.shape) * 3):
        cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
        assert torch.equal(
            cached, model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
        )


def test_what_does_not_fit_is_refused() -> None:
    model, x, tuned = made()
    with importance(tuned, torch.rand(3, 5)), pytest.raises(ValueError, match="does not fit an input"):
        model(x)
    with pytest.raises(ValueError, match="never negative"), importance(tuned, -torch.ones(2, 5)):
        pass
    twin, _ = net(12, 8, 6)
    lora = attach(twin, dw.LoRA)
    with pytest.raises(ValueError, match="for rst_lora"), importance(lora, None):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_brings_its_importance_and_the_next_one_without_has_none(checkpointing: bool) -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.RSTLoRA(dropout=0.0), seed=0)
    nudge(tuned, 0.3)
    plain = model(**batch).logits
    gamma = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) * 2
    with importance(tuned, gamma):
        model(**batch).loss.backward()
    wanted = [parameter.grad.clone() for parameter in tuned.parameters()]
    model.zero_grad()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, importance=gamma).loss.backward()
    for parameter, gradient in zip(tuned.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert torch.allclose(model(**batch).logits, plain)


@pytest.mark.parametrize("variant", ["p_w", "p_wo", "b_w", "b_wo"])
def test_a_batch_with_a_parse_is_weighed_as_the_variant_says(variant: str) -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.RSTLoRA(dropout=0.0, variant=variant), seed=0)
    nudge(tuned, 0.3)
    count, tokens = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(0)
    parse, units = torch.rand(count, 3, 3, 2, generator=generator), torch.arange(tokens).expand(count, -1) % 4 - 1
    gamma = torch.stack([spread(importance_of(one, variant), unit) for one, unit in zip(parse, units, strict=True)])
    with importance(tuned, gamma):
        wanted = model(**batch).logits
    assert torch.equal(model(**batch, parse=parse, units=units).logits, wanted)
    with pytest.raises(ValueError, match="parse and units"):
        model(**batch, parse=parse)


def test_tokens_find_their_units_and_units_whose_words_others_repeat_weigh_more() -> None:
    offsets = torch.tensor([[0, 0], [0, 3], [3, 7], [8, 9], [9, 12], [20, 22]])
    assert aligned(offsets, torch.tensor([[0, 8], [8, 13]])).tolist() == [-1, 0, 0, 1, 1, -1]
    p = overlap(torch.tensor([5, 6, 6, 7, 5, 9, 9]), torch.tensor([0, 0, 1, 1, 2, 2, -1]))
    assert p[..., 0].tolist() == [[0, 0.5, 0.5], [0.5, 0, 0], [0.5, 0, 0]]
    assert importance_of(p, "p_wo").argmax() == 0


def test_training_without_importance_says_so_once() -> None:
    model, x, tuned = made()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    rules = tuned.run(total_steps=2, optimizer=optimizer)
    with pytest.warns(UserWarning, match="trains as lora"):
        rules.step(lambda: model(x).square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules.step(lambda: model(x).square().mean())
    model, x, tuned = made()
    rules = tuned.run(total_steps=1, optimizer=torch.optim.SGD(tuned.parameters(), lr=0.1))
    with warnings.catch_warnings(), importance(tuned, torch.ones(2, 5)):
        warnings.simplefilter("error")
        rules.step(lambda: model(x).square().mean())


def test_what_holds_for_a_while_wins_over_what_batches_bring_and_leaves_nothing() -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.RSTLoRA(dropout=0.0), seed=0)
    nudge(tuned, 0.3)
    shape = batch["input_ids"].shape
    plain, brought, kept = model(**batch).logits, torch.rand(shape) * 2, torch.rand(shape)
    with importance(tuned, kept):
        wanted = model(**batch).logits
    model(**batch, importance=brought)
    with importance(tuned, kept):
        assert torch.equal(model(**batch).logits, wanted)
        assert torch.equal(model(**batch, importance=brought).logits, wanted)
    assert torch.equal(model(**batch).logits, plain)


def test_two_adapters_read_the_same_importance_and_examples_may_have_one_each() -> None:
    model, batch = FAMILIES["llama"]()
    tuned = {name: _named(model, name, seed) for seed, name in enumerate("ab")}
    gamma = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) * 2
    dw.activate(model, ["a", "b"])
    brought = model(**batch, importance=gamma).logits
    with importance(tuned["a"], gamma), importance(tuned["b"], gamma):
        assert torch.equal(model(**batch).logits, brought)
    alone = []
    for name in ("a", "b"):
        dw.activate(model, name)
        alone.append(model(**batch).logits)
    with dw.route(model, ["a", "b"]):
        mixed = model(**batch).logits
    assert torch.allclose(mixed[0], alone[0][0], atol=1e-5) and torch.allclose(mixed[1], alone[1][1], atol=1e-5)


def _named(model, name: str, seed: int) -> dw.Tuned:
    tuned = dw.attach(model, dw.RSTLoRA(dropout=0.0), name=name, seed=seed)
    nudge(tuned, 0.3, seed=seed)
    return tuned


def test_a_shorter_document_beside_a_longer_one_has_the_importance_it_has_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    long, short = torch.rand(5, 5, 2, generator=generator), torch.rand(3, 3, 2, generator=generator)
    padded = torch.full((5, 5, 2), -1.0)
    padded[:3, :3] = short
    units = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])
    both = gamma_of(None, torch.stack([long, padded]), units, "p_w")
    assert torch.allclose(both[1], spread(importance_of(short, "p_w"), units[1]))
