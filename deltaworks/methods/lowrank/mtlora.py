"""MTLoRA: a low-rank adaptation approach for efficient multi-task learning (Agiza et al. 2024, arXiv:2403.20320).

y = W x + s_s B_s A_s x for the shared stream; in the last block of every stage, output projection and feed-forward
layers also give each task its own y_t = W x + s_t B_t A_t x_t, the base always reading the shared x (mode `matrix`;
with `matrixv2` y_t has the shared change in it too; with `addition` there is no shared pair in that block, y = W x +
LayerNorm(sum_t y_t), and the output changes at the start). Streams open at the attention's output projection, h_t =
shortcut + y_t, and go through the rest of that block. Scales are direct multipliers. Norms, patch embeddings, relative
positions and patch merging train with it (`recipe`).
`with streams(tuned) as outputs: model(**batch)` collects every stage's task features, for dense decoders;
`with streams(tuned, task="depth"):` lets one task's stream go on to the model's own head. Backward belongs inside.
Use it for several predictions of one input; without tasks it is a LoRA.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...core import fields
from ...core.attach import unfreeze
from ...core.init import kaiming, ones, zeros
from ...core.method import LINEAR, Method, Placed, label, weight_at
from ...core.operators.multitask import AddedTasks, MultiTask, StreamBlock, TaskStreams
from ...core.part import Shared
from ...core.registry import method
from ...core.tuned import Tuned
from ...model.anatomy import Anatomy, Site

TASKED = ("attention.output", "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down")
MODES = ("matrix", "matrixv2", "addition")
RECIPE = ["patch", "norm", r".*relative_position_bias.*", r".*downsample\.reduction"]


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
    dropout: float = fields.fraction(0.05, "probability of dropping an input feature of a branch")
    mode: str = fields.choice("matrix", MODES, "what a task's output, or the shared one, is made of")
    recipe: bool = fields.flag(True, "train norms, patch embeddings, relative positions and patch merging as well")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exact_at_start", self.mode != "addition" or not self.tasks)

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        return {"streams": TaskStreams(list(self.tasks))}

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        streams = shared["streams"]
        assert isinstance(streams, TaskStreams)
        last = {block.path.rpartition(".")[0]: block for block in base.blocks}
        opening = {block.index for block in last.values()} if self.tasks else set()
        for site in base.select(self.on, what="weight"):
            if site.kind != "linear" or not site.called or site.rows is not None:
                raise ValueError(
                    f"mtlora takes linear layers that are called and whole, {site.name} is not; narrow on="
                )
            yield Placed(site, self._part(base, site, streams, site.block in opening), label(site))
        for block in base.blocks:
            if block.index in opening:
                final = block.index == max(opening)
                opens = StreamBlock(streams, final, self.mode == "addition")
                yield Placed(Site(block.path, "block", "block", None, block=block.index), opens, "tasks")
        if self.recipe:
            yield from self._recipe(base)

    def _recipe(self, base: Anatomy) -> Iterator[Placed]:
        try:
            sites = base.select(RECIPE, what="module", strict=False)
        except ValueError:  # a model with none of them
            return
        yield from unfreeze(base, [re.escape(site.path) for site in sites])

    def _part(self, base: Anatomy, site: Site, streams: TaskStreams, opens: bool) -> MultiTask | AddedTasks:
        weight = weight_at(base.model, site)
        task_a, task_b = None, None
        if opens and site.role in TASKED:
            task_a = kaiming(len(streams.tasks), self.task_rank, weight.fan_in)
            task_b = zeros(len(streams.tasks), weight.fan_out, self.task_rank)
            if self.mode == "addition":
                gain, shift = ones(weight.fan_out), zeros(weight.fan_out)
                return AddedTasks(task_a, task_b, gain, shift, streams, self.task_scale, self.dropout)
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        own = (task_a, task_b, self.task_scale, self.mode == "matrixv2")
        return MultiTask(a, b, streams, self.scale, self.dropout, *own)


@contextlib.contextmanager
def streams(tuned: Tuned, task: str | None = None) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Within the block every task has its stream.

    Args:
        tuned: an `mtlora` adapter with tasks.
        task: whose stream goes on to the rest of the model after the last stage; None for the shared one.

    Yields:
        for every stage's last block, by path, the streams that left it, by task; filled anew by every call.

    Raises:
        ValueError: for an adapter without tasks, or an unknown task.
    """
    found = tuned.state.adapters[tuned.name].shared.get("streams")
    if not isinstance(found, TaskStreams) or not found.tasks:
        raise ValueError(f"{tuned.method.slug} has no task streams; attach mtlora with tasks=[...]")
    if task is not None and task not in found.tasks:
        raise ValueError(f"there is no task {task!r}; there is {', '.join(found.tasks)}")
    found.running, found.wanted = True, task
    try:
        yield found.outputs
    finally:
        found.running, found.wanted = False, None
        found.outputs = {}
