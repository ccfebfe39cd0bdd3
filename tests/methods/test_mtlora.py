"""MTLoRA: every task has a stream of its own through the last block of a stage, over one base product."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import transformers as hf
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.multitask import AddedTasks, MultiTask, StreamBlock
from deltaworks.core.part import Trained
from deltaworks.methods.lowrank.mtlora import streams
from tests.families import FAMILIES
from tests.methods.toys import nudge

SMALL = {"tasks": ["depth", "edge"], "rank": 4, "task_rank": 2, "dropout": 0.0}


def swin() -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=3,
        drop_path_rate=0.0,
    )  # fmt: skip
    return hf.SwinForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}


def made(family: str = "vit", size: float = 0.1, **settings):
    model, batch = swin() if family == "swin" else FAMILIES[family]()
    tuned = dw.attach(model, dw.MTLoRA(**(SMALL | settings)), seed=0)
    if size:
        nudge(tuned, size)
    return model, batch, tuned


@pytest.mark.parametrize("family", ["vit", "swin", "bert_classification"])
def test_at_the_start_every_task_is_the_shared_stream_and_the_base(family: str) -> None:
    model, batch, tuned = made(family, size=0)
    with dw.disable(model):
        base = model(**batch).logits
    for task in (None, "depth", "edge"):
        with streams(tuned, task) as outputs:
            assert torch.allclose(model(**batch).logits, base, atol=1e-5)
            assert all(torch.allclose(one["depth"], one["edge"]) for one in outputs.values())
    assert not outputs or not tuned.state.adapters["default"].shared["streams"].outputs


def test_every_stage_opens_streams_at_the_output_and_the_feed_forward_part() -> None:
    model, batch, tuned = made("swin")
    opened = [part.site.path for part in tuned.parts() if isinstance(part, StreamBlock)]
    assert opened == ["swin.encoder.layers.0.blocks.1", "swin.encoder.layers.1.blocks.1"]
    tasked = [part.site for part in tuned.parts() if isinstance(part, MultiTask) and part.task_a is not None]
    assert len(tasked) == 6 and {site.role for site in tasked} == {"attention.output", "mlp.up", "mlp.down"}
    with streams(tuned) as outputs:
        model(**batch)
        assert list(outputs) == opened and outputs[opened[0]]["depth"].shape == (2, 64, 8)
        assert not torch.allclose(outputs[opened[0]]["depth"], outputs[opened[0]]["edge"])


def test_without_streams_it_is_a_lora() -> None:
    model, batch, tuned = made(recipe=False)
    twin, _ = FAMILIES["vit"]()
    lora = dw.attach(twin, dw.LoRA(rank=4, alpha=16.0), seed=0)
    theirs = {part.site.path: part for part in lora.parts()}
    with torch.no_grad():
        for part in tuned.parts():
            if isinstance(part, MultiTask):
                theirs[part.site.path].a.copy_(part.a)
                theirs[part.site.path].b.copy_(part.b)
    assert torch.allclose(model(**batch).logits, twin(**batch).logits, atol=1e-6)
    with streams(tuned):  # the shared stream is the same, streams or not
        assert torch.allclose(model(**batch).logits, twin(**batch).logits, atol=1e-6)


def test_a_tasks_loss_reaches_its_own_factors_and_the_shared_ones() -> None:
    model, batch, tuned = made()
    with streams(tuned, "edge"):
        model(**batch).logits.square().sum().backward()
    for part in tuned.parts():
        if isinstance(part, MultiTask) and part.task_a is not None:
            for factor in (part.task_a, part.task_b):
                assert factor.grad[0].abs().max() == 0 < factor.grad[1].abs().max()
        elif isinstance(part, MultiTask):
            assert part.b.grad.abs().max() > 0


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_a_tasks_output_leaves_the_shared_change_of_its_layer_out_or_not(mode: str) -> None:
    model, batch, tuned = made(mode=mode)
    last = next(part for part in tuned.parts() if isinstance(part, MultiTask) and part.site.path.endswith("1.mlp.fc2"))
    seen = []
    for factor in (1.0, 2.0):
        with torch.no_grad():
            last.b.mul_(factor)
        with streams(tuned, "depth"), torch.no_grad():
            seen.append(model(**batch).logits)
    assert torch.equal(*seen) == (mode == "matrix")


def test_base_products_do_not_grow_with_the_tasks() -> None:
    counts = []
    for tasks in (["a"], ["a", "b", "c", "d"]):
        model, batch, tuned = made(tasks=tasks, recipe=False)
        base = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        plain, calls = nn.functional.linear, []

        def counted(x, weight, bias=None, base=base, plain=plain, calls=calls):
            calls.append(id(weight) in base)
            return plain(x, weight, bias)

        with streams(tuned), mock.patch("torch.nn.functional.linear", counted), torch.no_grad():
            model(**batch)
        counts.append(sum(calls))
    assert counts[0] == counts[1] > 0


def test_the_formula_and_the_recipe() -> None:
    model, _, tuned = made("swin")
    for part in tuned.parts():
        if isinstance(part, MultiTask):
            layer = model.get_submodule(part.site.path)
            width = layer.in_features + layer.out_features
            count = sum(p.numel() for p in part.parameters())
            assert count == 4 * width + (2 * 2 * width if part.task_a is not None else 0)
    trained = {f"{part.site.path}.{part.site.parameter}" for part in tuned.parts() if isinstance(part, Trained)}
    wanted = {
        name
        for name, _ in swin()[0].named_parameters()
        if "norm" in name or "patch_embeddings" in name or "relative_position" in name or "reduction" in name
    }
    assert trained == wanted
    assert not any(isinstance(part, Trained) for part in made("swin", recipe=False)[2].parts())


@pytest.mark.parametrize("family", ["vit", "swin", "bert_classification"])
def test_in_the_mode_addition_the_shared_stream_is_the_norm_of_the_tasks_sum(family: str) -> None:
    model, batch, tuned = made(family, mode="addition", recipe=False)
    seen = {}
    added = {part.site.path: part for part in tuned.parts() if isinstance(part, AddedTasks)}
    assert added and not any(isinstance(p, MultiTask) and p.task_a is not None for p in tuned.parts())
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, a, y, path=path: seen.update({path: (a[0], y)}))
        for path in added
    ]
    with streams(tuned, "edge") as outputs:
        model(**batch).logits.square().sum().backward()
        assert {task: value.shape for task, value in next(iter(outputs.values())).items()}.keys() == {"depth", "edge"}
    for handle in handles:
        handle.remove()
    for path, part in added.items():
        layer, (x, y) = model.get_submodule(path), seen[path]
        shared, *each = x.chunk(3)
        base = nn.functional.linear(shared, layer.weight, layer.bias)
        tasks = [base + 4.0 * x_t @ a.T @ b.T for x_t, a, b in zip(each, part.task_a, part.task_b, strict=True)]
        whole = base + nn.functional.layer_norm(sum(tasks), (base.shape[-1],), part.gain, part.shift)
        assert torch.allclose(y, torch.cat([whole, *tasks]), atol=1e-4)
        opening = path.endswith(("attention.output.dense", "o_proj", "attention.attention.o_proj"))
        assert torch.equal(each[0], shared) == torch.equal(each[1], shared) == opening, path
        # The task whose stream is read trains, and so does the other, through the shared stream of the next layers.
        assert part.task_b.grad[1].abs().max() > 0


def test_without_a_wanted_task_the_shared_stream_goes_on_in_and_out_of_the_block() -> None:
    model, batch, tuned = made(mode="addition")
    alone = model(**batch).logits
    with streams(tuned):
        assert torch.equal(model(**batch).logits, alone)
    with dw.disable(model):
        assert not torch.allclose(model(**batch).logits, alone)
    assert not tuned.method.exact_at_start and dw.MTLoRA(mode="addition").exact_at_start


@pytest.mark.parametrize("mode", ["matrix", "addition"])
def test_files_keep_the_tasks(mode: str, tmp_path) -> None:
    model, batch, tuned = made(mode=mode)
    with streams(tuned, "edge"):
        expected = model(**batch).logits
    dw.save(model, tmp_path / "adapter")
    fresh, _ = FAMILIES["vit"]()
    with streams(dw.load(fresh, tmp_path / "adapter"), "edge"):
        assert torch.equal(fresh(**batch).logits, expected)


def test_what_streams_cannot_do_is_refused() -> None:
    model, batch, tuned = made("llama")
    with streams(tuned, "edge"):
        assert model(**batch, use_cache=False).logits.isfinite().all()
        with pytest.raises(ValueError, match="use_cache=False"):
            model(input_ids=batch["input_ids"], use_cache=True)
    with pytest.raises(ValueError, match="no task 'pose'"), streams(tuned, "pose"):
        pass
    plain = dw.attach(FAMILIES["vit"]()[0], dw.MTLoRA())
    with pytest.raises(ValueError, match="tasks="), streams(plain):
        pass
    with pytest.raises(ValueError, match="different names"):
        dw.MTLoRA(tasks=["a", "a"])
