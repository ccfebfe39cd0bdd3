"""One shared low-rank change and one for every task, over a base product that is made once for all.

In the last block of a stage every task has a stream of its own: the block is gone through once for the shared stream,
which records what the base's layers give, and once more for each task, in which the same layers give what was recorded
plus the task's own product with the task's own input. No base layer is multiplied twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Shared, Wrapper
from .low_rank import LowRank, dropped


class TaskStreams(Shared):
    """What the parts of one adapter have to know of each other while streams run.

    Attributes:
        tasks: their names.
        wanted: which task's stream goes on to the rest of the model after the last stage; None for the shared one.
        running: whether streams are made at all.
        stream: the stream at present: -1 the shared one, a task's number, or None outside the last blocks.
        base: what layers gave in the shared stream.
        outputs: by block's path, the streams that left it, by task.
    """

    settings: ClassVar[tuple[str, ...]] = ("tasks",)

    def __init__(self, tasks: list) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.running = False
        self.wanted: str | None = None
        self.stream: int | None = None
        self.base: dict[int, Tensor] = {}
        self.outputs: dict[str, dict[str, Tensor]] = {}


class MultiTask(LowRank):
    """The shared change of a layer, and its tasks' where it has them.

    Args:
        a, b, scale, dropout: the shared factors, as of `LowRank`.
        streams: shared by all parts.
        task_a, task_b: `tasks x rank x in` and `tasks x out x rank`, None for a layer that only passes streams on.
        task_scale: multiplies a task's product.
        joint: whether a task's output has the shared change in it.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout", "task_scale", "joint")
    borrowed: ClassVar[tuple[str, ...]] = ("streams",)

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        streams: TaskStreams,
        scale: float,
        dropout: float = 0.0,
        task_a: Tensor | None = None,
        task_b: Tensor | None = None,
        task_scale: float = 1.0,
        joint: bool = False,
    ) -> None:
        super().__init__(a, b, scale=scale, dropout=dropout)
        self.streams, self.task_scale, self.joint = streams, float(task_scale), joint
        self.task_a = None if task_a is None else nn.Parameter(task_a)
        self.task_b = None if task_b is None else nn.Parameter(task_b)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return self.streams.stream is not None or super().prefers_side(tokens, weight)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return super().with_base(x, weight, bias) if self.streams.stream is None else None

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        streams = self.streams
        if streams.stream is None:
            return None
        if streams.stream < 0:
            base = call(x)
            shared = base + super().side(x).to(base.dtype)
            streams.base[id(self)] = base if self.task_a is not None and not self.joint else shared
            return shared
        base = streams.base[id(self)]
        if self.task_a is None or self.task_b is None:
            return base
        a, b = self.task_a[streams.stream].to(x.dtype), self.task_b[streams.stream].to(x.dtype)
        return base + self.task_scale * ((dropped(self, x) @ a.T) @ b.T)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        if self.streams.stream is not None:
            raise ValueError("task streams need their layers to themselves; deactivate the other adapters")
        return super().act(x, y, weight)


class StreamBlock(Wrapper):
    """Opens the streams of a stage's last block.

    Args:
        streams: shared by all parts.
        final: whether this is the last such block, whose wanted stream goes on to the rest of the model.
    """

    settings: ClassVar[tuple[str, ...]] = ("final",)
    borrowed: ClassVar[tuple[str, ...]] = ("streams",)

    def __init__(self, streams: TaskStreams, final: bool) -> None:
        super().__init__()
        self.streams, self.final = streams, final

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        streams = self.streams
        if not streams.running:
            return call(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise ValueError("task streams go through a block several times and cannot fill a cache; use_cache=False")
        try:
            streams.stream = -1
            shared = call(*args, **kwargs)
            results = {}
            for number, task in enumerate(streams.tasks):
                streams.stream = number
                results[task] = call(*args, **kwargs)
        finally:
            streams.stream = None
            streams.base.clear()
        streams.outputs[self.site.path] = {
            task: value[0] if isinstance(value, tuple) else value for task, value in results.items()
        }
        return results[streams.wanted] if self.final and streams.wanted is not None else shared
