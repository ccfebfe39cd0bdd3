"""A plan foretells what a real step on real tensors takes, to the byte where it can, without any weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import deltaworks as dw
from deltaworks.core.registry import make, methods
from deltaworks.model.loading import TASKS, load_meta
from deltaworks.nursery import base_path
from deltaworks.study.machine import Machine, gauge
from deltaworks.study.memory import free, parse, shown
from deltaworks.study.plan import USUAL, likely_task, plan, warning
from deltaworks.study.shapes import Shapes
from deltaworks.training.head import head_of, next_token_loss
from deltaworks.training.recipe import Recipe

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 160}
TEXT = {"vocab_size": 512, "pad_token_id": 0, "max_position_embeddings": 512}
CONFIGS: dict[str, Any] = {
    "llama": (hf.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2), "LlamaForCausalLM", "causal-lm"),
    "gpt2": (
        hf.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=512, n_positions=512, pad_token_id=0),
        "GPT2LMHeadModel", "causal-lm",
    ),
    "mixtral": (
        hf.MixtralConfig(**SMALL, **TEXT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
                         sliding_window=None), "MixtralForCausalLM", "causal-lm",
    ),
    "bert": (hf.BertConfig(**SMALL, **TEXT, num_labels=3), "BertForSequenceClassification", "sequence-classification"),
    "t5": (
        hf.T5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4, pad_token_id=0,
                    decoder_start_token_id=0), "T5ForConditionalGeneration", "seq2seq",
    ),
    "vit": (
        hf.ViTConfig(**SMALL, image_size=32, patch_size=4, num_labels=3), "ViTForImageClassification",
        "image-classification",
    ),
}  # fmt: skip
COMBINATIONS = [
    ("llama", "lora", 8, {}),
    ("llama", "lora", 3, {}),
    ("llama", "lora", 8, {"checkpointing": True}),
    ("llama", "dora", 4, {"packing": True}),
    ("llama", "full", 8, {}),
    ("llama", "mezo", 16, {}),
    ("llama", "prefix_tuning", 4, {}),
    ("llama", "adalora", 4, {}),
    ("llama", "lst", 4, {"optimizer": "sgd"}),
    ("llama", "fourierft", 8, {"dtype": "bfloat16"}),
    ("gpt2", "houlsby", 4, {}),
    ("mixtral", "lora", 4, {}),
    ("mixtral", "ia3", 8, {}),
    ("bert", "oft", 8, {}),
    ("bert", "full", 16, {"checkpointing": True}),
    ("t5", "ia3", 8, {}),
    ("t5", "lora", 4, {"optimizer": "adafactor"}),
    ("vit", "vera", 16, {}),
    ("vit", "bitfit", 8, {}),
    ("llama", "eva", 8, {}),
    ("bert", "eva", 4, {}),
    ("llama", "lora_ga", 8, {}),
    ("gpt2", "lora_ga", 4, {}),
    ("llama", "rosa", 4, {}),
]
# What these methods do before they attach is no part of the step.
BRIEFLY: dict[str, dict[str, Any]] = {"rosa": {"warmup": 1}}
LENGTH = 64


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is there already is no garbage, so that the many collections below need not look at it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Callable[[str], str]:
    """A folder with a configuration and nothing else: there are no weights to load."""

    def made(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        config, architecture, _ = CONFIGS[name]
        config.architectures = [architecture]
        config.save_pretrained(folder)
        return str(folder)

    known: dict[str, str] = {}
    return lambda name: known.setdefault(name, known.get(name) or made(name))


def allocations(events: Any) -> list[int]:
    """Sizes of what the allocator gave, negative of what it got back, in the order of time."""
    found = []

    def walk(event: Any) -> None:
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
        for child in event.children:
            walk(child)

    for event in events.profiler.kineto_results.experimental_event_tree():
        walk(event)
    return [size for _, size in sorted(found, key=lambda pair: pair[0])]


def watched(work: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that are left of what torch's allocator gave during `work`, the most at once, and its result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        result = work()
        gc.collect()
    now = most = 0
    for size in allocations(events):
        now += size
        most = max(most, now)
    return now, most, result


def batch(name: str, size: int, packed: bool) -> dict[str, Any]:
    """What a collator would give, made by hand."""
    config, _, task = CONFIGS[name]
    if task == "image-classification":
        return {"pixel_values": torch.randn(size, 3, 32, 32), "labels": torch.zeros(size, dtype=torch.long)}
    ids = torch.randint(1, config.vocab_size, (size, LENGTH))
    labels = torch.zeros(size, dtype=torch.long) if task == "sequence-classification" else ids.clone()
    if packed:
        positions = torch.arange(LENGTH).remainder(LENGTH // 2).expand(size, -1).contiguous()
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def measured(name: str, slug: str, size: int, options: dict[str, Any]) -> int:
    """Most bytes at once of a run's second step, on real tensors, everything since the model was built counted."""
    config, _, task = CONFIGS[name]
    dtype = getattr(torch, options.get("dtype", "float32"))
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

    def build() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = getattr(hf, TASKS[task]).from_config(config, dtype=dtype)
        method = make(slug, **BRIEFLY.get(slug, {}))
        tuned = dw.attach(model, method, seed=0, data=[batch(name, 2, False)] if method.needs_data else None)
        model.train()
        model.config.use_cache = False
        if options.get("checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        groups = tuned.parameter_groups(1e-3)
        if options.get("optimizer") == "adafactor":
            from transformers.optimization import Adafactor

            optimizer: Any = Adafactor(groups, scale_parameter=False, relative_step=False)
        else:
            optimizer = kinds[options.get("optimizer", "adamw")](groups)
        rules = tuned.run(1000, optimizer=optimizer)
        rules.emit("attached")
        step(tuned, rules, optimizer)
        return tuned, rules, optimizer

    def step(tuned: Any, rules: Any, optimizer: Any) -> None:
        model = tuned.model
        inputs = batch(name, size, bool(options.get("packing")))
        head = head_of(model) if task == "causal-lm" else None

        def loss() -> torch.Tensor:
            return next_token_loss(model, head, inputs) if head is not None else model(**inputs).loss

        rules.emit("step_begin")
        if rules.owner is not None:
            with torch.no_grad():
                rules.owner.own_step(rules.run, loss, 1e-3)
        else:
            value = loss()
            penalty = rules.penalty()
            (value if penalty is None else value + penalty).backward()
            del value, penalty
            rules.emit("gradients")
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
        rules.emit("step_end")
        optimizer.zero_grad(set_to_none=True)

    held, _, built = watched(build)
    _, most, _ = watched(lambda: step(*built))
    return held + most


@pytest.mark.parametrize(
    ("name", "slug", "size", "options"), COMBINATIONS, ids=["-".join(map(str, c[:3])) for c in COMBINATIONS]
)
def test_the_peak_is_foretold_within_a_tenth(place, name, slug, size, options) -> None:
    recipe = Recipe.of({"base": place(name), "batch_size": size, "max_length": LENGTH, "dtype": "float32"} | options)
    made = plan(recipe, [make(slug, **BRIEFLY.get(slug, {}))], search=False)
    assert not made.reasons and made.work.task == CONFIGS[name][2]
    foretold, real = made.forecasts[0].peak, measured(name, slug, size, options)
    print(f"{name} {slug} {size} {options}: foretold {foretold:,}, real {real:,}, {100 * (foretold / real - 1):+.2f} %")
    assert foretold == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("name", "slug", "settings"),
    [
        ("llama", "eva", {"rho": 1.0}),
        ("t5", "eva", {"rho": 1.0, "on": "attention"}),
        ("llama", "lora_ga", {"overrides": {"q_proj": {"rank": 3}}}),
        ("gpt2", "lora_ga", {"direction": "random", "size": "weight"}),
        ("mixtral", "lora_ga", {"rank": 100, "on": "expert.down"}),
        ("mixtral", "rosa", {"warmup": 0, "density": 0.01}),
    ],
)
def test_sizes_of_a_method_that_measures_first_are_those_it_has_with_data(place, name, slug, settings) -> None:
    config, _, task = CONFIGS[name]
    method = make(slug, **settings)
    made = plan(Recipe.of({"base": place(name), "batch_size": 2, "max_length": LENGTH}), [method], search=False)
    assert not made.reasons
    base = getattr(hf, TASKS[task]).from_config(config)
    summary = dw.attach(base, method, data=[batch(name, 2, False)], seed=0).summary()
    found = made.forecasts[0]
    assert (found.trainable, found.stored_bytes, found.share) == (
        summary.trainable, summary.stored_bytes, summary.share
    )  # fmt: skip


def test_ranks_that_data_would_distribute_are_planned_evenly(place) -> None:
    recipe = Recipe.of({"base": place("llama"), "batch_size": 2, "max_length": LENGTH})
    spread, even = (plan(recipe, [make("eva", rank=4, rho=rho)], search=False).forecasts[0] for rho in (3.0, 1.0))
    assert (spread.trainable, spread.stored_bytes, spread.peak) == (even.trainable, even.stored_bytes, even.peak)


def test_every_method_is_planned(place) -> None:
    recipe = Recipe.of({"base": place("llama"), "batch_size": 1, "max_length": 32})
    made = plan(recipe, [make(slug) for slug in methods()], search=False)
    assert not made.reasons and len(made.forecasts) == len(methods())


def test_what_values_would_choose_is_drawn_or_all() -> None:
    with Shapes():
        scores = torch.zeros(1 << 23)
        chosen = scores.topk(1000).indices
        masked = scores[scores > 0]
    assert len(chosen.unique()) == 1000 and chosen.min() >= 0 and (1 << 22) < chosen.max() < 1 << 23
    assert masked.shape == scores.shape


def test_the_split_is_the_peak_and_the_sizes_are_those_of_the_adapter(place) -> None:
    recipe = Recipe.of({"base": place("llama"), "max_length": LENGTH})
    made = plan(recipe, [make("lora", rank=4), make("full")], search=False)
    lora, full = made.forecasts
    for one in made.forecasts:
        step = one.step
        assert one.peak == step.weights + step.gradients + step.optimizer + step.activations + step.logits
    config, _, _ = CONFIGS["llama"]
    summary = dw.attach(hf.LlamaForCausalLM(config), dw.LoRA(rank=4)).summary()
    assert (lora.trainable, lora.stored_bytes, lora.share) == (summary.trainable, summary.stored_bytes, summary.share)
    # AdamW keeps two values for each one that trains, and one count for each tensor.
    assert lora.step.optimizer == pytest.approx(8 * lora.trainable, rel=0.01)
    assert full.trainable == made.parameters and full.step.optimizer >= 8 * full.trainable
    # The base's own values are kept beside those that train in their place.
    assert full.step.weights == pytest.approx(2 * 4 * made.parameters, rel=0.01)


def test_the_largest_batch_fits_and_one_more_does_not(place) -> None:
    for slug, room in (("lora", 30 << 20), ("full", 30 << 20), ("ia3", 9 << 20)):
        base = {"base": place("llama"), "max_length": LENGTH}
        made = plan(Recipe.of({**base, "batch_size": 8}), [make(slug)], memory=room)
        largest = made.forecasts[0].largest_batch
        assert largest and largest > 1
        peaks = [
            plan(Recipe.of({**base, "batch_size": size}), [make(slug)], search=False).forecasts[0].peak
            for size in (largest, largest + 1)
        ]
        assert peaks[0] <= room < peaks[1], (slug, largest, peaks)


def test_nothing_fits_where_the_weights_do_not(place) -> None:
    made = plan(Recipe.of({"base": place("llama"), "max_length": LENGTH}), [make("lora")], memory=1 << 18)
    assert made.forecasts[0].largest_batch == 0 and made.forecasts[0].fits is False and not made.fitting


def test_changes_are_predicted_as_they_come_out(place) -> None:
    options = {"base": place("llama"), "max_length": LENGTH, "batch_size": 8}
    room = 5 << 20
    made = plan(Recipe.of(options), [make("lora"), make("mezo")], memory=room)
    lora = made.forecasts[0]
    changes = {change.what: change for change in lora.changes}
    assert not lora.fits and lora.peak > room
    again = plan(Recipe.of(options | {"checkpointing": True}), [make("lora")], search=False).forecasts[0]
    assert changes["--checkpointing"].peak == again.peak < lora.peak
    shorter = plan(Recipe.of(options | {"max_length": LENGTH // 2}), [make("lora")], search=False).forecasts[0]
    assert changes[f"--max-length {LENGTH // 2}"].peak == shorter.peak
    smaller = next(change for change in lora.changes if change.what.startswith("--batch-size"))
    assert smaller.fits and smaller.peak <= room
    assert all(change.fits == (change.peak <= room) for change in lora.changes)
    assert changes["--checkpointing"].time > lora.time


def test_a_leaner_method_is_named_where_none_fits(place) -> None:
    options = {"base": place("llama"), "max_length": LENGTH, "batch_size": 8}
    room = 5 << 20
    found = plan(Recipe.of(options), [make("lora")], memory=room).forecasts[0]
    leaner = {change.what: change for change in found.changes if change.what.startswith("--method")}
    assert not found.fits and "--method mezo" in leaner and "--method full" not in leaner
    for what, change in leaner.items():
        alone = plan(Recipe.of(options), [make(what.split()[1])], search=False).forecasts[0]
        assert change.fits and change.peak == alone.peak <= room
    both = plan(Recipe.of(options), [make("lora"), make("mezo")], memory=room)
    assert both.fitting and not any(change.what.startswith("--method") for change in both.forecasts[0].changes)


def test_packing_is_advised_where_padding_is_what_does_not_fit() -> None:
    from deltaworks.training.tune import read_data

    options = {"base": "nursery:decoder", "data": "nursery:docstrings", "limit": 400, "batch_size": 16}
    recipe = Recipe.of(options | {"max_length": 256})
    prepared = read_data(recipe)[3]
    free = plan(recipe, [make("lora")], prepared=prepared, search=False).forecasts[0].peak
    found = plan(recipe, [make("lora")], prepared=prepared, memory=int(0.9 * free)).forecasts[0]
    packed = next(change for change in found.changes if change.what.startswith("--packing"))
    rows = int(packed.what.split()[-1])
    assert rows < 16 and packed.peak < free
    again = Recipe.of(options | {"packing": True, "batch_size": rows, "max_length": 256})
    alone = plan(again, [make("lora")], prepared=read_data(again)[3], search=False).forecasts[0]
    assert packed.peak == pytest.approx(alone.peak, rel=0.05)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_quantised_base_is_as_large_as_it_is_stored(kind: str, tmp_path) -> None:
    pytest.importorskip("torchao" if kind != "nf4" else "bitsandbytes")
    from deltaworks.model.loading import load_base

    config = hf.LlamaConfig(**SMALL | {"hidden_size": 128}, **TEXT, num_key_value_heads=2)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    recipe = Recipe.of({"base": str(tmp_path), "batch_size": 4, "max_length": LENGTH, "quantize": kind})
    made = plan(recipe, [make("lora"), make("full")], search=False)
    assert "quantised" in made.reasons["full"]
    assert made.forecasts[0].step.weights < plan(
        Recipe.of({"base": str(tmp_path)}), [make("lora")], search=False
    ).forecasts[0].step.weights  # fmt: skip
    model = load_base(str(tmp_path), quantize=kind, device="cpu")
    tuned = dw.attach(model, dw.LoRA(), seed=0)
    held = 0
    for tensor in (*model.parameters(), *model.buffers()):
        value: Any = tensor.data
        state = getattr(tensor, "quant_state", None)
        if type(value).__module__.startswith("torchao"):
            held += sum(getattr(value, inner).nbytes for inner in value.__tensor_flatten__()[0])
        else:
            held += value.nbytes + (0 if state is None else state.absmax.nbytes)
    assert made.forecasts[0].step.weights == pytest.approx(held, rel=0.02)
    optimizer = torch.optim.AdamW(tuned.parameters())
    model.train()
    model.config.use_cache = False

    def step() -> None:
        inputs = batch("llama", 4, packed=False)
        next_token_loss(model, model.lm_head, inputs).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    state = sum(value.nbytes for kept in optimizer.state.values() for value in kept.values())
    _, most, _ = watched(step)
    foretold, real = made.forecasts[0].peak, held + state + most
    print(f"{kind}: foretold {foretold:,}, real {real:,}, {100 * (foretold / real - 1):+.2f} %")
    assert foretold == pytest.approx(real, rel=0.1)


def test_methods_are_told_apart_in_time(place, monkeypatch) -> None:
    monkeypatch.setattr("deltaworks.study.plan.gauge", lambda *_: Machine(flops=1e11, bandwidth=2e10, call=0.0))
    slugs = ["lora", "dora", "lst", "full"]
    assert set(slugs) < set(USUAL)
    recipe = Recipe.of({"base": place("llama"), "max_length": 256, "batch_size": 4})
    heard: list[str] = []
    made = plan(recipe, [make(slug) for slug in slugs], memory=64 << 20, tell=heard.append)
    assert not made.reasons and heard == slugs
    times = {one.method: one.time for one in made.forecasts}
    assert all(one.fits and one.largest_batch for one in made.forecasts)
    # A ladder beside the base stops the backward pass before the base; training all of it makes one product more.
    assert times["lst"] < 1 < times["lora"] < times["dora"] and times["full"] > 1


def test_what_cannot_be_planned_is_said_and_stops_nothing(place) -> None:
    asked = [make("prefix_tuning"), make("lst"), make("neft"), make("lora")]
    made = plan(Recipe.of({"base": place("vit")}), asked, search=False)
    assert "text model" in made.reasons["lst"] and [one.method for one in made.forecasts][-1] == "lora"
    assert "neft" not in made.reasons
    with pytest.raises(OSError, match="no such folder"):
        plan(Recipe.of({"base": "./nowhere"}))
    with pytest.raises(ValueError, match="no form for the task"):
        plan(Recipe.of({"base": place("vit"), "task": "causal-lm"}))


def test_data_say_how_long_batches_are() -> None:
    from deltaworks.training.tune import read_data

    recipe = Recipe.of({"base": "nursery:decoder", "data": "nursery:docstrings", "limit": 200, "batch_size": 4})
    prepared = read_data(recipe)[3]
    lengths = [len(ids) for ids in prepared.train["input_ids"]]
    made = plan(recipe, [make("lora")], prepared=prepared, search=False)
    assert made.work.length == made.lengths.longest == max(lengths) and made.work.padded
    assert made.lengths.tokens == pytest.approx(4 * sum(lengths) / len(lengths), rel=0.05)
    assert 0 < made.lengths.padding < 1 and 0 < made.lengths.supervised < 1
    assert made.forecasts[0].peak < plan(recipe, search=False).forecasts[0].peak


def test_choices_are_planned_as_the_sequences_they_are() -> None:
    from deltaworks.training.tune import read_data

    rows = {"base": "nursery:decoder", "data": "nursery:choices", "limit": 40, "batch_size": 2, "max_length": 64}
    recipe = Recipe.of(rows)
    prepared = read_data(recipe)[3]
    lengths = prepared.train["lengths"][:]
    made = plan(recipe, [make("lora")], prepared=prepared, search=False)
    assert (made.work.task, made.work.batch_size, made.lengths.sequences) == ("multiple-choice", 8, 4)
    assert made.work.length == made.lengths.longest == max(map(max, lengths)) <= 64
    assert made.lengths.tokens == pytest.approx(2 * sum(map(sum, lengths)) / len(lengths), rel=0.1)
    assert likely_task(str(base_path("decoder")), recipe) == "causal-lm", "a decoder is made for text"


def test_a_plan_of_a_large_base_needs_little_memory_itself(tmp_path) -> None:
    config = hf.LlamaConfig(num_hidden_layers=4, vocab_size=32000, torch_dtype="bfloat16")  # 7B's widths
    config.save_pretrained(tmp_path)
    recipe = Recipe.of({"base": str(tmp_path), "batch_size": 4, "max_length": 1024})
    _, most, made = watched(lambda: plan(recipe, search=False))
    weights = sum(parameter.numel() * 2 for parameter in load_meta(tmp_path).parameters())
    assert made.forecasts[0].step.weights > weights > 2e9
    assert most < 64 << 20
    # Every layer keeps its input, the attention's and the feed-forward part's operands for the backward pass.
    kept = made.forecasts[0].step.saved / (4 * 4 * 1024)
    assert 2 * 4096 * 2 < kept < 2 * (16 * 4096 + 4 * 11008)


def test_a_run_is_warned_of_when_it_will_not_fit(place) -> None:
    assert warning(Recipe.of({"base": place("llama"), "max_length": LENGTH})) is None
    said = warning(Recipe.of({"base": place("llama"), "max_length": 512, "batch_size": 1 << 20, "method": "ia3"}))
    assert said and "deltaworks plan" in said and "\n" not in said
    assert warning(Recipe.of({"base": "./nowhere"})) is None


def test_a_machine_is_measured() -> None:
    machine = gauge("cpu", torch.float32)
    assert machine.flops > 1e8 and machine.bandwidth > 1e7 and 0 < machine.call < 1e-2


def test_sizes_are_read_as_they_are_written() -> None:
    assert [parse(text) for text in ("24GiB", "24GB", "1.5 MiB", "512", "2gi")] == [
        24 << 30, 24 * 10**9, 3 << 19, 512, 2 << 30
    ]  # fmt: skip
    assert shown(24 << 30) == "24.0 GiB" and shown(300 << 20) == "300 MiB"
    for wrong in ("", "-1GiB", "lots", "0", "1PB"):
        with pytest.raises(ValueError, match="24GiB"):
            parse(wrong)
    available = free("cpu")
    assert available is None or available > 1 << 20
