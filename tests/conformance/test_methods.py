"""What every registered method promises, on a decoder. A page added to the registry is tested without a line here."""

from __future__ import annotations

import copy
import gc
import pickle
from functools import partial

import pytest
import torch

import deltaworks as dw
from deltaworks.core.method import WeightMethod, weight_at
from deltaworks.core.part import Trained
from tests.conformance.subject import METHODS, adapted, attach, base_names, build, loss, nudge, output, settings

every = pytest.mark.parametrize("slug", METHODS)
weight_methods = pytest.mark.parametrize(
    "slug", [slug for slug, cls in dw.methods().items() if issubclass(cls, WeightMethod)]
)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3))


@every
def test_the_output_at_the_start_is_the_base_output_or_openly_not(slug: str) -> None:
    model, batch = build("llama")
    with torch.no_grad():
        base = output(model, batch)
        attach(model, slug, "llama")
        start = output(model, batch)
    assert start.shape == base.shape
    assert close(start, base) == dw.methods()[slug].exact_at_start


@every
def test_disabled_is_the_base_bit_for_bit(slug: str) -> None:
    model, batch = build("llama")
    base = output(model, batch)
    nudge(attach(model, slug, "llama"))
    assert not torch.equal(output(model, batch), base)
    with dw.disable(model):
        assert torch.equal(output(model, batch), base)


@weight_methods
def test_the_number_of_trained_values_is_the_formula(slug: str) -> None:
    model, _ = build("llama")
    tuned = attach(model, slug, "llama")
    for _, part in tuned.named_parts():
        if part.site.parameter is None:  # what hands something on to the parts at the weights
            assert not list(part.parameters())
            continue
        weight = weight_at(model, part.site)
        own = sum(p.numel() for name, p in part.named_parameters() if p.requires_grad)
        lent = sum(p.numel() for name in part.borrowed for p in getattr(part, name).parameters() if p.requires_grad)
        assert own - lent == tuned.method.at(part.site.path).count(weight)


@every
def test_gradients_reach_every_trained_tensor_and_nothing_else(slug: str) -> None:
    model, batch, tuned = adapted(slug)
    loss(model, batch).backward()
    trained = {id(p) for p in tuned.parameters()}
    assert trained
    for name, parameter in tuned.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for name, parameter in model.named_parameters():
        assert id(parameter) in trained or parameter.grad is None, name


@every
def test_a_loss_that_is_held_after_its_backward_pass_holds_no_activations(slug: str) -> None:
    model, batch, tuned = adapted(slug)

    def plain() -> list[torch.Tensor]:
        return [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]

    gc.collect()
    before = plain()  # what other tests have left, too
    value = loss(model, batch)
    value.backward()
    tokens, known = batch["input_ids"].numel(), {id(tensor) for tensor in before}
    own = {buffer.data_ptr() for buffer in model.buffers()} | {p.grad.data_ptr() for p in tuned.parameters()}
    new = [tensor for tensor in plain() if id(tensor) not in known and tensor.data_ptr() not in own]
    wide = [tensor for tensor in new if tensor.numel() >= 8 * tokens and tensor.numel() % tokens == 0]
    assert not [tuple(tensor.shape) for tensor in wide]
    assert value.requires_grad


@every
def test_the_gradient_is_the_derivative(slug: str) -> None:
    cls = dw.methods()[slug]
    # GPT-2 computes in float64 throughout; Llama's norm and rotary embedding round to float32.
    model, batch, tuned = adapted(slug, "gpt2", dtype=torch.float64)
    loss(model, batch).backward()
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in tuned.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(tuned.parameters(), directions, strict=True))

    def agrees(step: float) -> bool:
        values = []
        for sign in (1, -2):
            for p, d in zip(tuned.parameters(), directions, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss(model, batch))
        for p, d in zip(tuned.parameters(), directions, strict=True):
            p.add_(d, alpha=step)
        numeric = (values[0] - values[1]) / (2 * step)
        return bool((numeric - slope).abs() <= 1e-5 * numeric.abs().clamp(min=1e-6))

    with torch.no_grad():
        # The smaller step is for methods with kinks (ReLU), which the larger may cross.
        assert (agrees(1e-5) or agrees(1e-7)) == cls.exact_gradient


@every
def test_merged_equals_unmerged_or_merging_is_refused_by_name(slug: str) -> None:
    model, batch, tuned = adapted(slug)
    with torch.no_grad():
        beside = output(model, batch)
        if not tuned.method.mergeable:
            with pytest.raises(ValueError, match=slug):
                dw.merge(model)
            assert torch.equal(output(model, batch), beside)
            return
        dw.merge(model)
        assert close(output(model, batch), beside)
        dw.unmerge(model)
        assert torch.equal(output(model, batch), beside)
        dw.bake(model)
        assert close(output(model, batch), beside)
    assert not [name for name in model.state_dict() if "deltaworks" in name]


@every
def test_detach_gives_back_the_base_bit_for_bit(slug: str) -> None:
    model, batch = build("llama")
    base, classes = output(model, batch), [type(m) for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    configuration = copy.deepcopy(model.config.to_dict())
    nudge(attach(model, slug, "llama"))
    assert list(base_names(model)) == list(before)
    dw.detach(model)
    assert torch.equal(output(model, batch), base)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(m) for m in model.modules()] == classes
    assert model.config.to_dict() == configuration


@every
def test_saving_and_loading_is_bitwise(slug: str, tmp_path) -> None:
    model, batch, tuned = adapted(slug)
    expected = output(model, batch)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = build("llama")
    loaded = dw.load(fresh, tmp_path / "adapter")
    ours, theirs = tuned.tensors(), loaded.tensors()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert torch.equal(output(fresh, batch), expected)
    assert loaded.method == tuned.method
    dw.detach(fresh)
    assert not [name for name in fresh.state_dict() if "deltaworks" in name]


@every
def test_it_works_in_bfloat16(slug: str) -> None:
    model, batch = build("llama", torch.bfloat16)
    tuned = attach(model, slug, "llama", dtype=torch.bfloat16)
    nudge(tuned)
    result = output(model, batch)
    assert result.dtype == torch.bfloat16 and result.isfinite().all()
    loss(model, batch).backward()
    for name, p in tuned.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    places = [part.site for part in tuned.parts() if isinstance(part, Trained)]
    in_place = {id(model.get_parameter(f"{site.path}.{site.parameter}")) for site in places}
    assert all(p.dtype == torch.float32 or id(p) in in_place for p in tuned.parameters())


@every
def test_autocast_gives_the_same_within_its_precision(slug: str) -> None:
    model, batch, _ = adapted(slug)
    with torch.no_grad():
        exact = output(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            rough = output(model, batch)
    assert close(rough.float(), exact, 0.1)


@every
def test_copies_and_pickles_are_as_good_as_the_model(slug: str) -> None:
    model, batch, _ = adapted(slug)
    expected = output(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, batch), expected)
        with torch.no_grad():
            for parameter in dw.tuned(twin).parameters():
                parameter.add_(0.05)
        assert not torch.equal(output(twin, batch), expected)
        dw.detach(twin)
    assert torch.equal(output(model, batch), expected)


@every
def test_moving_the_model_moves_the_adapter(slug: str) -> None:
    model, batch, tuned = adapted(slug)
    expected = output(model, batch)
    model.double()
    assert all(p.dtype == torch.float64 for p in tuned.parameters())
    assert close(output(model, batch).float(), expected, 1e-4)


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(slug: str, reentrant: bool) -> None:
    model, batch, tuned = adapted(slug)
    model.train()
    torch.manual_seed(0)
    loss(model, batch).backward()
    plain = [p.grad.clone() for p in tuned.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(0)
    loss(model, batch).backward()
    for (name, p), expected in zip(tuned.named_parameters(), plain, strict=True):
        assert p.grad is not None and close(p.grad, expected, 1e-4), name


@every
def test_it_compiles(slug: str) -> None:
    torch._dynamo.reset()
    model, batch, tuned = adapted(slug)
    expected = loss(model, batch)
    expected.backward()
    plain = [p.grad.clone() for p in tuned.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    value = loss(compiled, batch)
    assert close(value.detach(), expected.detach(), 1e-4)
    value.backward()
    for (name, p), wanted in zip(tuned.named_parameters(), plain, strict=True):
        assert p.grad is not None and close(p.grad, wanted, 1e-3), name


@every
def test_generation_with_a_cache_equals_generation_without(slug: str) -> None:
    model, batch, tuned = adapted(slug)
    nudge(tuned, seed=5, size=0.1)
    prompt = {"input_ids": batch["input_ids"][:, :5], "attention_mask": torch.ones_like(batch["input_ids"][:, :5])}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**prompt, use_cache=False, **options))
    assert cached.shape[1] == 11


@every
def test_two_adapters_switch_and_stack(slug: str) -> None:
    model, batch, _ = adapted(slug)
    first = output(model, batch)
    second = attach(model, slug, "llama", name="second")
    nudge(second, seed=2)
    both = output(model, batch)
    assert both.isfinite().all()
    dw.activate(model, "second")
    alone = output(model, batch)
    assert not torch.equal(alone, first)
    dw.activate(model, "default")
    assert torch.equal(output(model, batch), first)
    dw.activate(model, None)
    with dw.disable(model):
        base = output(model, batch)
    assert torch.equal(output(model, batch), base)
    dw.detach(model, "default")
    dw.activate(model, "second")
    assert torch.equal(output(model, batch), alone)


@every
def test_frozen_it_acts_and_does_not_train(slug: str) -> None:
    model, batch, tuned = adapted(slug)
    expected, count = output(model, batch), len(tuned.parameters())
    dw.freeze(model, "default")
    assert torch.equal(output(model, batch), expected) and not tuned.parameters()
    dw.unfreeze(model, "default")
    assert len(tuned.parameters()) == count


@every
def test_the_same_seed_gives_the_same_adapter(slug: str) -> None:
    made = []
    for _ in range(2):
        model, _ = build("llama")
        torch.manual_seed(len(made))
        made.append(attach(model, slug, "llama").tensors())
    assert list(made[0]) == list(made[1])
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@every
def test_every_hyper_parameter_is_declared_with_help_and_range(slug: str) -> None:
    import dataclasses

    for item in dataclasses.fields(settings(slug)):
        assert item.metadata.get("help") and item.metadata.get("check"), item.name


def _train(slug: str, steps: int, stop: int | None = None, tmp_path=None):
    """Plain-loop training for `steps`; with `stop`, interrupted there and continued from what was saved."""
    torch.manual_seed(0)
    model, batch = build("llama")
    tuned = attach(model, slug, "llama")
    lr = min(dw.methods()[slug].default_lr, 1e-2)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(lr, weight_decay=0.01))
    rules = tuned.run(total_steps=steps, seed=7, optimizer=optimizer)
    rules.emit("attached")
    for step in range(steps):
        if step == stop:
            dw.save(model, tmp_path / "adapter")
            kept = copy.deepcopy((optimizer.state_dict(), rules.state_dict()))
            model, batch = build("llama")
            tuned = dw.load(model, tmp_path / "adapter")
            optimizer = torch.optim.AdamW(tuned.parameter_groups(lr, weight_decay=0.01))
            rules = tuned.run(total_steps=steps, seed=7, optimizer=optimizer)
            rules.emit("attached")
            optimizer.load_state_dict(kept[0])
            rules.load_state_dict(kept[1])
        rows = torch.tensor([step % 2, (step + 1) % 2])
        inputs = {k: v[rows] for k, v in batch.items()}
        rules.emit("step_begin")
        if rules.owner is not None:
            rules.owner.own_step(rules.run, partial(loss, model, inputs), lr)
        else:
            value = loss(model, inputs)
            penalty = rules.penalty()
            (value if penalty is None else value + penalty).backward()
            rules.emit("gradients")
            optimizer.step()
        rules.emit("step_end")
        optimizer.zero_grad()
    rules.emit("finished")
    return tuned.tensors()


@every
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_run(slug: str, stop: int, tmp_path) -> None:
    whole = _train(slug, 6)
    resumed = _train(slug, 6, stop, tmp_path)
    assert list(whole) == list(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@every
def test_its_sizes_are_known_without_weights(slug: str) -> None:
    from deltaworks.core.costs import size_on

    model, _ = build("llama")
    told = size_on(copy.deepcopy(model).to("meta"), settings(slug))
    if settings(slug).needs_data:
        assert told == {"reason": "depends on the data"}
        return
    summary = attach(model, slug, "llama").summary()
    assert (told["trainable"], told["saved_bytes"]) == (summary.trainable, summary.stored_bytes)
