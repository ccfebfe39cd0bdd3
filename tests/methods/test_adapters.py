"""What the bottleneck adapters must hold: each its place, its input, its count, and the base's output at U = 0."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.core.operators.bottleneck import ACTIVATIONS, Bottleneck, SeriesBottleneck
from deltaworks.model.anatomy import describe
from tests.families import FAMILIES

METHODS = [dw.Houlsby(size=8), dw.Pfeiffer(reduction=4), dw.ParallelAdapter(size=8)]


def adapters(tuned: dw.Tuned) -> list[Bottleneck]:
    return [part for part in tuned.parts() if isinstance(part, Bottleneck)]


@torch.no_grad()
def nudge(tuned: dw.Tuned, size: float = 0.3) -> dw.Tuned:
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)
    return tuned


@torch.no_grad()
def silence(tuned: dw.Tuned) -> None:
    """U = 0 and b_U = 0 in every adapter."""
    for part in adapters(tuned):
        part.up.zero_()
        part.up_bias.zero_()


def series(part: Bottleneck, r: Tensor) -> Tensor:
    """`s A(r)` by its definition."""
    h = ACTIVATIONS[part.activation](r @ part.down.T + part.down_bias)
    return part.scale * (h @ part.up.T + part.up_bias)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"relu"}))
def test_the_hand_written_gradient_is_the_derivative(activation: str, learned: bool) -> None:
    torch.manual_seed(0)
    part = Bottleneck(4, 3, activation, 1.5, learned, start="houlsby", spread=0.5).double()
    y, r = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.allclose(part.added(y, r), y + series(part, r))
    assert torch.autograd.gradcheck(lambda y, r, *own: part.added(y, r), (y, r, *part.parameters()))
    assert torch.autograd.gradcheck(lambda y, *own: part.added(y, y), (y, *part.parameters()))


def test_backward_keeps_the_input_and_the_pre_activation_only() -> None:
    part = SeriesBottleneck(64, 4)
    y = torch.randn(100, 64, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        part.output(y, y)
    assert sum(saved) - sum(p.numel() for p in part.parameters()) <= 100 * (64 + 4)


@pytest.mark.parametrize("family", ["llama", "bert", "opt", "t5", "vit", "mixtral", "mamba", "falcon_new"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_without_their_output_they_leave_the_base(method: Method, family: str) -> None:
    model, batch = FAMILIES[family]()
    with torch.no_grad():
        base = model(**batch).logits
        silence(dw.attach(model, method))
        assert torch.allclose(model(**batch).logits, base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_merging_is_refused(method: Method) -> None:
    model, _ = FAMILIES["llama"]()
    dw.attach(model, method)
    with pytest.raises(ValueError, match=f"{method.slug} cannot be merged"):
        dw.merge(model)


# Houlsby.


def test_houlsby_counts_are_the_papers() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    tuned = dw.attach(model, dw.Houlsby(size=64))
    assert len(adapters(tuned)) == 24
    assert sum(p.numel() for part in adapters(tuned) for p in part.parameters()) == 2_379_264
    assert sum(p.numel() for p in tuned.parameters()) == 2_379_264 + 38_400


def test_houlsby_sits_after_each_sub_layer_before_its_residual() -> None:
    model, batch = FAMILIES["bert"]()
    tuned = nudge(dw.attach(model, dw.Houlsby(size=8, norms=False)))
    layer, parts = model.bert.encoder.layer[0], adapters(tuned)[:2]
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda m, a, k: inputs.append((*a, *k.values())[0]), with_kwargs=True)
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda m, a, y: outputs.append(y if isinstance(y, Tensor) else y[0]))
    model(input_ids=batch["input_ids"][:1])
    x = inputs[0]
    with dw.disable(model), torch.no_grad():
        z = layer.attention.output.dense(layer.attention.self(x)[0])
        h = layer.attention.output.LayerNorm(x + z + series(parts[0], z))
        o = layer.output.dense(layer.intermediate(h))
        expected = layer.output.LayerNorm(h + o + series(parts[1], o))
    assert torch.allclose(outputs[0], expected, atol=1e-5)


def test_houlsby_starts_close_to_the_base_but_not_on_it() -> None:
    model, batch = FAMILIES["bert"]()
    base = model(**batch).logits
    dw.attach(model, dw.Houlsby(), seed=0)
    assert 1e-5 < ((model(**batch).logits - base).abs().max() / base.abs().max()).item() < 1e-2


def test_houlsby_takes_cross_attention_when_asked_and_blocks_by_name() -> None:
    model, _ = FAMILIES["t5"]()
    assert len(adapters(dw.attach(model, dw.Houlsby(size=4)))) == 8
    dw.detach(model)
    assert len(adapters(dw.attach(model, dw.Houlsby(size=4, cross=True)))) == 10
    dw.detach(model)
    tuned = dw.attach(model, dw.Houlsby(size=4, on=r"decoder\.block\.1"))
    assert all(path.startswith("decoder.block.1.") for path, _ in tuned.named_parts())


# Pfeiffer.


def test_pfeiffer_counts_are_the_papers() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    tuned = dw.attach(model, dw.Pfeiffer())
    assert len(list(tuned.parts())) == 12
    assert sum(p.numel() for p in tuned.parameters()) == 894_528


def test_pfeiffer_reads_the_normalised_sum_of_a_post_norm_block() -> None:
    model, _ = FAMILIES["bert"]()
    tuned = nudge(dw.attach(model, dw.Pfeiffer(reduction=4)))
    output, part = model.bert.encoder.layer[0].output, adapters(tuned)[0]
    hidden, h = torch.randn(2, 3, 48), torch.randn(2, 3, 32)
    with torch.no_grad():
        result = output(hidden, h)
        o, norm = output.dense(hidden), nn.LayerNorm(32, eps=output.LayerNorm.eps)
        norm.weight.copy_(output.LayerNorm.weight)
        norm.bias.copy_(output.LayerNorm.bias)
        assert torch.allclose(result, norm(o + series(part, norm(o + h)) + h), atol=1e-5)
        assert not torch.allclose(result, norm(o + series(part, o) + h), atol=1e-2)
        silence(tuned)
        assert torch.equal(output(hidden, h), norm(o + h))


def test_pfeiffer_follows_the_feed_forward_part_of_a_pre_norm_block() -> None:
    model, _ = FAMILIES["llama"]()
    tuned = nudge(dw.attach(model, dw.Pfeiffer(reduction=4)))
    mlp, part = model.model.layers[0].mlp, adapters(tuned)[0]
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        result = mlp(x)
        with dw.disable(model):
            o = mlp(x)
    assert torch.allclose(result, o + series(part, o), atol=1e-5)


# Parallel.


def test_parallel_counts_are_the_formula() -> None:
    with torch.device("meta"):
        model = hf.BartModel(hf.BartConfig(d_model=1024, encoder_layers=1, decoder_layers=1))
    tuned = dw.attach(model, dw.ParallelAdapter())
    assert sum(p.numel() for p in tuned.parameters()) == 2 * 1_050_112
    dw.detach(model)
    both = dw.attach(model, dw.ParallelAdapter(beside="both", learn_scale=True))
    assert sum(p.numel() for p in both.parameters()) == 4 * 1_050_113


@pytest.mark.parametrize("role", ["mlp", "attention"])
@pytest.mark.parametrize("family", ["llama", "bert", "opt", "t5", "bart"])
def test_parallel_reads_what_the_sub_layer_reads(family: str, role: str) -> None:
    model, batch = FAMILIES[family]()
    last = {"mlp": "mlp.down", "attention": "attention.output"}[role]
    with torch.no_grad():
        for site in describe(model).sites:
            if site.role == last:
                for parameter in model.get_submodule(site.path).parameters():
                    parameter.zero_()
    base = model(**batch).logits
    nudge(dw.attach(model, dw.ParallelAdapter(size=4, beside=role)))
    assert not torch.allclose(model(**batch).logits, base, atol=1e-3), "a silent sub-layer must not silence the adapter"


def test_parallel_beside_a_feed_forward_part_of_two_modules() -> None:
    model, _ = FAMILIES["bert"]()
    tuned = nudge(dw.attach(model, dw.ParallelAdapter(size=4)))
    layer, part = model.bert.encoder.layer[0], adapters(tuned)[0]
    h = torch.randn(2, 3, 32)
    with torch.no_grad():
        result = layer.feed_forward_chunk(h)
        with dw.disable(model):
            o = layer.output.dense(layer.intermediate(h))
            expected = layer.output.LayerNorm(o + series(part, h) + h)
    assert torch.allclose(result, expected, atol=1e-5)


def test_parallel_scales_its_branch_linearly() -> None:
    torch.manual_seed(0)
    x, changes = torch.randn(2, 3, 32), []
    for scale in (1.0, 4.0):
        model, _ = FAMILIES["llama"]()
        nudge(dw.attach(model, dw.ParallelAdapter(size=4, scale=scale), seed=0))
        mlp = model.model.layers[0].mlp
        with torch.no_grad():
            with dw.disable(model):
                base = mlp(x)
            changes.append(mlp(x) - base)
    assert torch.allclose(changes[1], 4 * changes[0], rtol=1e-4, atol=1e-5)


def test_parallel_and_a_prefix_are_mam() -> None:
    model, batch = FAMILIES["bart"]()
    nudge(dw.attach(model, dw.ParallelAdapter(size=4), name="adapter"))
    alone = model(**batch).logits
    nudge(dw.attach(model, dw.PrefixTuning(length=3), name="prefix"))
    both = model(**batch).logits
    dw.activate(model, "prefix")
    assert not torch.allclose(both, alone, atol=1e-4) and not torch.allclose(both, model(**batch).logits, atol=1e-4)


def test_taps_hold_nothing_after_a_pass_and_survive_copies_and_failures(tmp_path) -> None:
    model, batch = FAMILIES["bert"]()
    tuned = nudge(dw.attach(model, dw.ParallelAdapter(size=4)))
    expected = model(**batch).logits
    tape = tuned.state.adapters["default"].shared["tape"]
    assert not tape.held
    broken = model.bert.encoder.layer[1].output.register_forward_pre_hook(lambda m, a: a[5])
    with pytest.raises(IndexError):
        model(**batch)
    broken.remove()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).logits, expected)
    dw.save(model, tmp_path)
    fresh, _ = FAMILIES["bert"]()
    dw.load(fresh, tmp_path)
    assert torch.equal(fresh(**batch).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_taps_work_under_checkpointing(reentrant: bool) -> None:
    model, batch = FAMILIES["bert"]()
    tuned = nudge(dw.attach(model, dw.ParallelAdapter(size=4)))
    model.train()
    model(**batch).loss.backward()
    plain = [p.grad.clone() for p in tuned.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(tuned.parameters(), plain, strict=True))


def test_every_example_may_have_its_own_adapter() -> None:
    model, batch = FAMILIES["bert"]()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    for name, method in (("a", dw.ParallelAdapter(size=4)), ("b", dw.Houlsby(size=4, norms=False))):
        nudge(dw.attach(model, method, name=name, seed=0))
    dw.activate(model, "a")
    a = model(**inputs).logits
    dw.activate(model, "b")
    b = model(**inputs).logits
    with dw.route(model, ["b", "a"]):
        mixed = model(**inputs).logits
    assert torch.allclose(mixed[0], b[0], atol=1e-5) and torch.allclose(mixed[1], a[1], atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_a_model_without_blocks_is_refused_in_one_line(method: Method) -> None:
    model, _ = FAMILIES["mlp"]()
    with pytest.raises(ValueError, match=f"{method.slug} sits in the blocks of a transformer") as refusal:
        dw.attach(model, method)
    assert "\n" not in str(refusal.value)


def test_a_method_that_finds_no_place_says_so_though_a_head_would_train() -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    model = hf.ResNetForImageClassification(config)
    with pytest.raises(ValueError, match="parallel_adapter found nothing to change in ResNetForImageClassification"):
        dw.attach(model, dw.ParallelAdapter(), also="head")
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is as it was"
