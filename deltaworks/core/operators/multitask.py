"""One shared low-rank change and one for every task, over a base product that is made once for all.

In the last block of a stage every task has a stream of its own: the block is gone through once for the shared stream,
which records what the base's layers give, and once more for each task, in which the same layers give what was recorded
plus the task's own product with the task's own input. No base layer is multiplied twice. Where the shared stream itself
is made of the tasks' (`AddedTasks`), all go through the block together, one behind the other in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta, Shared, Wrapper
from .low_rank import LowRank, dropped

SHARED, TOGETHER = -1, -2
"""Streams that are no task's: the shared one, and all of them one behind the other."""


class TaskStreams(Shared):
    """What the parts of one adapter have to know of each other while streams run.

    Attributes:
        tasks: their names.
        wanted: which task's stream goes on to the rest of the model after the last stage; None for the shared one.
        running: whether streams are made at all.
        stream: the stream at present: SHARED, TOGETHER, a task's number, or None outside the last blocks.
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
        if streams.stream == TOGETHER:
            first = x.unflatten(0, (len(streams.tasks) + 1, -1))[0]
            y = call(first)
            y = y + super().side(first).to(y.dtype)
            return torch.cat([y] * (len(streams.tasks) + 1))
        if streams.stream == SHARED:
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


class AddedTasks(Delta):
    """Tasks' changes of a layer, of which the shared stream is made: `y_t = W x + s B_t A_t x_t`, and
    `y = W x + LayerNorm(sum_t y_t)`.

    Args:
        task_a, task_b: `tasks x rank x in` and `tasks x out x rank`.
        gain, shift: of the norm, `out` each.
        streams: shared by all parts.
        scale: multiplies a task's product.
        dropout: probability of dropping an input feature of a branch.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout")
    borrowed: ClassVar[tuple[str, ...]] = ("streams",)
    lean = True
    mergeable = False

    def __init__(
        self,
        task_a: Tensor,
        task_b: Tensor,
        gain: Tensor,
        shift: Tensor,
        streams: TaskStreams,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.task_a, self.task_b = nn.Parameter(task_a), nn.Parameter(task_b)
        self.gain, self.shift = nn.Parameter(gain), nn.Parameter(shift)
        self.streams, self.scale, self.dropout = streams, float(scale), float(dropout)

    def dense(self) -> Tensor:
        """The tasks' changes together, before the norm; the streams, not this, make the output."""
        return self.scale * (self.task_b @ self.task_a).sum(0)

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        if self.streams.stream != TOGETHER:
            raise ValueError(f"{self.site.path} is made of its tasks' streams, which run in a call of its whole block")
        first, *own = x.unflatten(0, (len(self.streams.tasks) + 1, -1))
        base = call(first)
        tasks = dropped(self, torch.stack(own)).flatten(1, -2)
        change = self.scale * (tasks @ self.task_a.to(x.dtype).mT) @ self.task_b.to(x.dtype).mT
        each = base + change.view(len(own), *base.shape)
        gain, shift = self.gain.to(x.dtype), self.shift.to(x.dtype)
        shared = base + nn.functional.layer_norm(each.sum(0), gain.shape, gain, shift)
        return torch.cat([shared.unsqueeze(0), each]).flatten(0, 1)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        raise ValueError("task streams need their layers to themselves; deactivate the other adapters")


class StreamBlock(Wrapper):
    """Opens the streams of a stage's last block.

    Args:
        streams: shared by all parts.
        final: whether this is the last such block, whose wanted stream goes on to the rest of the model.
        together: whether the shared stream is made of the tasks', which therefore always run.
    """

    settings: ClassVar[tuple[str, ...]] = ("final", "together")
    borrowed: ClassVar[tuple[str, ...]] = ("streams",)

    def __init__(self, streams: TaskStreams, final: bool, together: bool = False) -> None:
        super().__init__()
        self.streams, self.final, self.together = streams, final, together

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        streams = self.streams
        if not (streams.running or self.together):
            return call(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise ValueError("task streams go through a block several times and cannot fill a cache; use_cache=False")
        try:
            shared, results = (self._together if self.together else self._in_turn)(call, args, kwargs)
        finally:
            streams.stream = None
            streams.base.clear()
        if streams.running:
            streams.outputs[self.site.path] = {task: _hidden(value) for task, value in results.items()}
        return results[streams.wanted] if self.final and streams.wanted is not None else shared

    def _in_turn(self, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.streams.stream = SHARED
        shared, results = call(*args, **kwargs), {}
        for number, task in enumerate(self.streams.tasks):
            self.streams.stream = number
            results[task] = call(*args, **kwargs)
        return shared, results

    def _together(self, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        count = len(self.streams.tasks) + 1
        rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        self.streams.stream = TOGETHER
        value = call(*_repeated(args, rows, count), **_repeated(kwargs, rows, count))
        shared, *each = (_chunk(value, number, count) for number in range(count))
        return shared, dict(zip(self.streams.tasks, each, strict=True))


def _hidden(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _repeated(value: Any, rows: int, count: int) -> Any:
    """What has one row an example, `count` times one behind the other."""
    if isinstance(value, Tensor):
        return torch.cat([value] * count) if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _repeated(inner, rows, count) for key, inner in value.items()}
    return type(value)(_repeated(inner, rows, count) for inner in value) if type(value) in (tuple, list) else value


def _chunk(value: Any, number: int, count: int) -> Any:
    if isinstance(value, Tensor):
        return value.unflatten(0, (count, -1))[number]
    return tuple(_chunk(inner, number, count) for inner in value) if isinstance(value, tuple) else value
