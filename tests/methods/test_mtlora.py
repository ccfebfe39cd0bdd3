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
from deltaworks.methods.lowrank.mtlora import joint_loss, streams
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
        assert list(outputs) == opened and outputs[opened[0]]["depth"].shape == (2, 16, 16)
        assert not torch.allclose(outputs[opened[0]]["depth"], outputs[opened[0]]["edge"])


def test_a_stages_streams_leave_it_behind_its_patch_merging_which_the_shared_one_enters_once() -> None:
    model, batch, tuned = made("swin", size=0)
    rows: list[int] = []
    reduction = model.get_submodule("swin.encoder.layers.0.downsample.reduction")
    reduction.register_forward_hook(lambda layer, args, y: rows.append(len(y)))
    stages = model(**batch, output_hidden_states=True).hidden_states[1:]
    assert rows == [2]
    with streams(tuned) as outputs, torch.no_grad():
        for _ in range(2):
            model(**batch)
            for each, stage in zip(outputs.values(), stages, strict=True):
                assert all(torch.allclose(each[task], stage, atol=1e-5) for task in ("depth", "edge"))
    assert sorted(rows[1:]) == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("family", "on", "roles"),
    [
        ("vit", "all", {"attention.output"}),
        ("vit", "mlp", {"mlp.up"}),
        ("llama", "mlp", {"mlp.up", "mlp.gate"}),
        ("gpt_neox", "all", {"attention.output", "mlp.up"}),
    ],
)
def test_streams_open_where_no_layer_before_has_tasks(family: str, on: str, roles: set[str]) -> None:
    parts = made(family, on=on)[2].parts()
    assert {part.site.role for part in parts if isinstance(part, MultiTask) and part.opens} == roles


@pytest.mark.parametrize("mode", ["matrix", "addition"])
def test_a_stream_is_not_dropped_from(mode: str) -> None:
    model, batch, tuned = made(mode=mode, dropout=0.5, recipe=False)
    tasked = {part.site.path: part for part in tuned.parts() if getattr(part, "task_a", None) is not None}
    seen: dict[str, list] = {path: [] for path in tasked}
    for path in tasked:
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda layer, args, y, path=path: seen[path].append((args[0], y)))
    model.train()
    with streams(tuned), torch.no_grad():
        model(**batch)
    for path, part in tasked.items():
        layer = model.get_submodule(path)
        if mode == "addition":  # all streams in one call
            seen[path] = list(zip(*(value.chunk(3) for value in seen[path][0]), strict=True))
        (shared, _), *each = seen[path]
        base = nn.functional.linear(shared, layer.weight, layer.bias)
        for (x, y), a, b in zip(each, part.task_a, part.task_b, strict=True):
            whole = torch.allclose(y, base + 4.0 * x @ a.T @ b.T, atol=1e-4)
            assert whole == (part.site.role != "attention.output"), path


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


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_base_products_do_not_grow_with_the_tasks(family: str) -> None:
    counts = []
    for tasks in (["a"], ["a", "b", "c", "d"]):
        model, batch, tuned = made(family, tasks=tasks, recipe=False)
        base = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        plain, calls = nn.functional.linear, []

        def counted(x, weight, bias=None, base=base, plain=plain, calls=calls):
            calls.append(id(weight) in base)
            return plain(x, weight, bias)

        with streams(tuned), mock.patch("torch.nn.functional.linear", counted), torch.no_grad():
            model(**batch)
        counts.append(sum(calls))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("plus", [False, True])
def test_the_formula_and_the_recipe(plus: bool) -> None:
    model, _, tuned = made("swin", plus=plus)
    changed = [part.site.path for part in tuned.parts() if isinstance(part, MultiTask)]
    assert sum("reduction" in path for path in changed) == plus
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
    assert trained == {name for name in wanted if not (plus and "reduction" in name)}
    assert not any(isinstance(part, Trained) for part in made("swin", recipe=False, plus=plus)[2].parts())


def everything(model: nn.Module, batch: dict, tuned: dw.Tuned) -> torch.Tensor:
    """The output and the last stage's streams."""
    with streams(tuned) as outputs:
        logits = model(**batch).logits
        return torch.cat([value.flatten() for value in (logits, *list(outputs.values())[-1].values())])


@pytest.mark.parametrize("mode", ["matrix", "addition"])
def test_trained_scales_begin_at_the_given_ones_and_are_counted_and_kept(mode: str, tmp_path) -> None:
    seen, sizes = [], []
    for trained in (False, True):
        model, batch, tuned = made(mode=mode, size=0, recipe=False, scale=2.0, train_scale=trained)
        generator = torch.Generator().manual_seed(3)
        for name, factor in tuned.named_parameters():
            if name.endswith(("weight.b", "task_b")):
                factor.data = torch.randn(factor.shape, generator=generator) * 0.1
        seen.append(everything(model, batch, tuned))
        sizes.append(tuned.summary().trainable)
    assert torch.allclose(*seen, atol=1e-4)
    scales = [value for name, value in tuned.named_parameters() if name.endswith("sigma")]
    alone, tasked = 12 if mode == "matrix" else 9, 3  # of two blocks' six layers, and with one a task
    assert sizes[1] - sizes[0] == sum(value.numel() for value in scales) == alone + 2 * tasked
    seen[1].square().sum().backward()
    for value in scales:
        assert value.grad.abs().min() > 0
        value.data *= 1.5
    dw.save(model, tmp_path / "adapter")
    fresh, _ = FAMILIES["vit"]()
    assert torch.equal(everything(fresh, batch, dw.load(fresh, tmp_path / "adapter")), everything(model, batch, tuned))


def test_without_tasks_it_merges_and_with_them_it_does_not() -> None:
    model, batch, tuned = made("swin", tasks=[], plus=True, train_scale=True)
    beside = model(**batch).logits
    assert torch.allclose(dw.merge(model)(**batch).logits, beside, atol=1e-5) and tuned.state.board.merged
    with pytest.raises(ValueError, match="mtlora cannot be merged"):
        dw.merge(made()[0])


def test_a_joint_loss_is_weighed_as_in_the_paper() -> None:
    losses = {"semseg": torch.tensor(2.0), "edge": torch.tensor(0.5)}
    assert joint_loss(losses) == 27.0 and joint_loss(losses, {"semseg": 0.5, "edge": 4.0}) == 3.0
    with pytest.raises(ValueError, match="mtlora: no weight for 'pose'"):
        joint_loss({"pose": torch.tensor(1.0)})


class Decoder(nn.Module):
    """A task's 1 x 1 down-samplers, one a stage, and its prediction for every pixel of a 16 x 16 image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in range(2))
        self.head = nn.Conv2d(8, width, 1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        maps = [down(one.mT.unflatten(-1, (4, 4))) for down, one in zip(self.down, features, strict=True)]
        return nn.functional.interpolate(self.head(torch.cat(maps, 1)), size=(16, 16))


def dense(tasked: bool) -> tuple[dict[str, float], dict[str, float]]:
    """First and last losses of two dense tasks; unless `tasked`, the tasks' own factors are not trained."""
    model, _ = swin()
    settings = {"tasks": ["semseg", "depth"], "rank": 1, "task_rank": 4, "dropout": 0.0, "recipe": False}
    tuned = dw.attach(model, dw.MTLoRA(**settings), seed=0)
    torch.manual_seed(1)
    decoders = nn.ModuleDict({"semseg": Decoder(2), "depth": Decoder(1)})
    planted = nn.functional.interpolate(torch.randn(16, 3, 4, 4), size=(16, 16))
    images = planted + 0.1 * torch.randn_like(planted)
    depth, semseg = planted[:, 0] * planted[:, 1], (planted[:, 1] * planted[:, 2] > 0).long()
    optimizer = torch.optim.Adam([*tuned.parameters(), *decoders.parameters()], lr=1e-2)
    history = []
    for _ in range(40):
        with streams(tuned) as outputs:
            model(pixel_values=images)
            guess = {task: decoders[task]([stage[task] for stage in outputs.values()]) for task in decoders}
            losses = {
                "semseg": nn.functional.cross_entropy(guess["semseg"], semseg),
                "depth": nn.functional.mse_loss(guess["depth"][:, 0], depth),
            }
            joint_loss(losses).backward()
        for name, factor in tuned.named_parameters():
            factor.grad = factor.grad if tasked or "task_" not in name else None
        optimizer.step()
        optimizer.zero_grad()
        history.append({task: loss.item() for task, loss in losses.items()})
    return history[0], history[-1]


def test_dense_tasks_that_ask_for_different_things_learn_from_streams_of_their_own() -> None:
    start, end = dense(tasked=True)
    _, alike = dense(tasked=False)
    for task in ("semseg", "depth"):
        assert end[task] < 0.5 * start[task] and end[task] < 0.8 * alike[task], task


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
    with pytest.raises(ValueError, match="mtlora: plus is for patch mergings"):
        made(plus=True)


def test_a_run_whose_loss_opens_no_streams_is_refused() -> None:
    model, batch, tuned = made()
    rules = tuned.run(2, optimizer=torch.optim.SGD(tuned.parameters(), lr=0.1))
    rules.emit("attached")
    with pytest.raises(ValueError, match=r"mtlora: tasks=.* only inside streams"):
        rules.step(lambda: model(**batch).loss)
    with streams(tuned, "edge"):
        rules.step(lambda: model(**batch).loss)
    assert rules.run.step == 1
    # There the tasks are part of the shared stream, and train without.
    assert not made(mode="addition")[2].rules and not made(tasks=[])[2].rules
