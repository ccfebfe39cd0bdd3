"""MTLoRA: a low-rank adaptation approach for efficient multi-task learning (Agiza et al. 2024, arXiv:2403.20320).

y = W x + s_s B_s A_s x for the shared stream; in the last block of every stage, output projection and feed-forward
layers also give each task its own y_t = W x + s_t B_t A_t x_t, the base always reading the shared x (mode `matrix`;
with `matrixv2` y_t has the shared change in it too; with `addition` there is no shared pair in that block, y = W x +
LayerNorm(sum_t y_t), and the output changes at the start). Streams open at the attention's output projection, h_t =
shortcut + y_t, and go through the rest of that block and the patch merging behind it. Scales are direct multipliers.
Norms, patch embeddings, relative positions and patch mergings train with it (`recipe`).
`with streams(tuned) as outputs: model(**batch)` collects every stage's task features, for dense decoders of your own,
and `joint_loss` weighs what they lose; `with streams(tuned, task="depth"):` lets one task's stream go on to the model's
own head. Backward belongs inside. An adapter is merged whole or not at all, so one with tasks is not.
Use it for several predictions of one input; without tasks it is a LoRA.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.attach import unfreeze
from ...core.init import kaiming, ones, zeros
from ...core.method import LINEAR, Method, Placed, label, weight_at
from ...core.operators.multitask import AddedTasks, MultiTask, Opened, StreamBlock, StreamMerging, TaskStreams
from ...core.part import Shared
from ...core.registry import method
from ...core.rule import Rule
from ...core.tuned import Tuned
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight

TASKED = ("attention.output", "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down")
MODES = ("matrix", "matrixv2", "addition")
MERGING = r".*downsample\.reduction"
RECIPE = ["patch", "norm", r".*relative_position_bias.*"]
WEIGHTS = {"semseg": 1.0, "human_parts": 2.0, "sal": 5.0, "normals": 10.0, "edge": 50.0, "depth": 1.0}


def _different(names: Any) -> bool:
    good = isinstance(names, (list, tuple)) and all(isinstance(one, str) and one for one in names)
    return good and len(set(names)) == len(names)


@method("mtlora", paper="2403.20320", family="lowrank")
class MTLoRA(Method):
    """Shared and task-specific LoRA; trains `rank (in + out)` values a layer, `task_rank (in + out)` more a task."""

    mergeable = False
    overridable = False
    default_lr = 5e-4
    # What goes into an expert of a fused stack is not the stream of the block.
    refuses = ("mixtral", "mamba")

    on: Any = fields.sites(LINEAR)
    tasks: Any = fields.declared([], "names of the tasks", "a list of different names", _different)
    rank: int = fields.positive(64, "r_s, rank of the shared change")
    task_rank: int = fields.positive(4, "r_t, rank of each task's change")
    scale: float = fields.number(4.0, "s_s, factor of the shared change", above=0)
    task_scale: float = fields.number(4.0, "s_t, factor of each task's change", above=0)
    train_scale: bool = fields.flag(False, "train the factors, one a change, from these values on")
    dropout: float = fields.fraction(0.05, "probability of dropping an input feature of a branch")
    mode: str = fields.choice("matrix", MODES, "what a task's output, or the shared one, is made of")
    recipe: bool = fields.flag(True, "train norms, patch embeddings, relative positions and patch merging as well")
    plus: bool = fields.flag(False, "give patch merging the shared change instead of training it whole")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exact_at_start", self.mode != "addition" or not self.tasks)
        object.__setattr__(self, "mergeable", not self.tasks)

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        return {"streams": TaskStreams(list(self.tasks))}

    def rules(self) -> list[Rule]:
        return [Opened()] if self.tasks and self.mode != "addition" else []

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        streams, mergings = shared["streams"], _some(base, [MERGING])
        assert isinstance(streams, TaskStreams)
        if self.plus and not mergings:
            raise ValueError(f"mtlora: plus is for patch mergings, {type(base.model).__name__} has none; leave it out")
        last = {block.path.rpartition(".")[0]: block for block in base.blocks}
        opening = {block.index for block in last.values()} if self.tasks else set()
        sites = list(dict.fromkeys([*base.select(self.on, what="weight"), *(mergings if self.plus else ())]))
        for site in sites:
            if site.kind != "linear" or not site.called or site.rows is not None:
                raise ValueError(
                    f"mtlora takes linear layers that are called and whole, {site.name} is not; narrow on="
                )
            opens = _opens(site, sites, base) if site.block in opening and site.role in TASKED else None
            yield Placed(site, self._part(weight_at(base.model, site), streams, opens), label(site))
        for index in sorted(opening):
            path, opened = base.blocks[index].path, StreamBlock(streams, index == max(opening), self.mode == "addition")
            yield Placed(Site(path, "block", "block", None, block=index), opened, "tasks")
        for site in mergings if self.tasks else ():
            whole = Site(site.path.rpartition(".")[0], None, "other", None, block=site.block)
            yield Placed(whole, StreamMerging(streams), "tasks")
        if self.recipe and (also := _some(base, RECIPE if self.plus else [*RECIPE, MERGING])):
            yield from unfreeze(base, [re.escape(site.path) for site in also])

    def _part(self, weight: Weight, streams: TaskStreams, opens: bool | None) -> MultiTask | AddedTasks:
        scale, task_scale = (1.0, 1.0) if self.train_scale else (self.scale, self.task_scale)
        tasks: dict[str, Any] = {}
        if opens is not None:
            count = len(streams.tasks)
            tasks["task_a"] = kaiming(count, self.task_rank, weight.fan_in)
            tasks["task_b"] = zeros(count, weight.fan_out, self.task_rank)
            tasks["task_sigma"] = ones(count) * self.task_scale if self.train_scale else None
            if self.mode == "addition":
                gain, shift = ones(weight.fan_out), zeros(weight.fan_out)
                own = (streams, task_scale, self.dropout, opens)
                return AddedTasks(tasks["task_a"], tasks["task_b"], gain, shift, *own, tasks["task_sigma"])
            tasks |= {"task_scale": task_scale, "joint": self.mode == "matrixv2", "opens": opens}
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        sigma = ones(1) * self.scale if self.train_scale else None
        return MultiTask(a, b, streams, scale, self.dropout, sigma=sigma, **tasks)


def _some(base: Anatomy, on: list[str]) -> list[Site]:
    """The modules that any of these name; none in a model without them."""
    try:
        return base.select(on, what="module", strict=False)
    except ValueError:
        return []


def _opens(site: Site, sites: list[Site], base: Anatomy) -> bool:
    """Whether no layer before this one gives the tasks streams of their own."""
    before = {"attention.output": (), "mlp.down": TASKED[:-1]}.get(site.role or "", TASKED[:1])
    before = before[1:] if site.block is not None and base.blocks[site.block].parallel else before
    return not any(other.block == site.block and other.role in before for other in sites)


def streams(tuned: Tuned, task: str | None = None) -> AbstractContextManager[dict[str, dict[str, Tensor]]]:
    """Within the block every task has its stream.

    Args:
        tuned: an `mtlora` adapter with tasks.
        task: whose stream goes on to the rest of the model after the last stage; None for the shared one.

    Returns:
        What gives, for every stage by the path of its last block, the streams that left it (behind its patch merging,
        where it has one), by task; filled anew by every call.

    Raises:
        ValueError: for an adapter without tasks, or an unknown task.
    """
    found = tuned.shared.get("streams")
    if not isinstance(found, TaskStreams) or not found.tasks:
        raise ValueError(f"{tuned.method.slug} has no task streams; attach mtlora with tasks=[...]")
    if task is not None and task not in found.tasks:
        raise ValueError(f"there is no task {task!r}; there is {', '.join(found.tasks)}")
    return found.open(task)


def joint_loss(losses: Mapping[str, Tensor], weights: Mapping[str, float] = WEIGHTS) -> Tensor:
    """The tasks' losses (scalars) under fixed weights, the paper's where none are given, in one.

    Raises:
        ValueError: for a task without a weight.
    """
    for task in losses:
        if task not in weights:
            raise ValueError(f"mtlora: no weight for {task!r}, only for {', '.join(weights)}; give weights={{...}}")
    return torch.stack([weights[task] * loss for task, loss in losses.items()]).sum()
