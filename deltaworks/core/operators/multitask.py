"""One shared low-rank change and one for every task, over a base product that is made once for all.

In the last block of a stage every task has a stream of its own: the block is gone through once for the shared stream,
which records what the base's layers give, and once more for each task, in which the same layers give what was recorded
plus the task's own product with the task's own input. No base layer is multiplied twice. Where the shared stream itself
is made of the tasks' (`AddedTasks`), all go through the block together, one behind the other in the batch. Before any
task has an input of its own, layers read the shared one for all, after its dropout; streams are not dropped from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta, Shared, Wrapper
from ..rule import Rule, Run
from .low_rank import LowRank, dropped

SHARED, TOGETHER = -1, -2
"""Streams that are no task's: the shared one, and all of them one behind the other."""


class TaskStreams(Shared):
    """What the parts of one adapter have to know of each other while streams run.

    Attributes:
        tasks: their names.
        wanted: which task's stream goes on to the rest of the model after the last stage; None for the shared one.
        running: whether streams are made at all.
        opened: whether they ever were.
        stream: the stream at present: SHARED, TOGETHER, a task's number, or None outside the last blocks.
        base: what layers give all tasks in the shared stream, and what the shared change read.
        outputs: by block's path, the streams that left its stage, by task.
        stage: the block whose streams have not been through a patch merging yet.
    """

    settings: ClassVar[tuple[str, ...]] = ("tasks",)

    def __init__(self, tasks: list) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.running = self.opened = False
        self.wanted: str | None = None
        self.stream: int | None = None
        self.base: dict[int, tuple[Tensor, Tensor]] = {}
        self.outputs: dict[str, dict[str, Tensor]] = {}
        self.stage: str | None = None

    @contextlib.contextmanager
    def open(self, task: str | None) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Within the block streams are made; yields `outputs`."""
        self.running, self.opened, self.wanted = True, True, task
        try:
            yield self.outputs
        finally:
            self.running, self.wanted, self.stage = False, None, None
            self.outputs = {}


class MultiTask(LowRank):
    """The shared change of a layer, and its tasks' where it has them.

    Args:
        a, b, scale, dropout: the shared factors, as of `LowRank`.
        streams: shared by all parts.
        task_a, task_b: `tasks x rank x in` and `tasks x out x rank`, None for a layer that only passes streams on.
        task_scale: multiplies a task's product.
        joint: whether a task's output has the shared change in it.
        opens: whether tasks read what the shared change reads, no layer before having given them streams of their own.
        sigma, task_sigma: trained scales beside the fixed ones, `1` and `tasks`; None for none.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout", "task_scale", "joint", "opens")
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
        opens: bool = False,
        sigma: Tensor | None = None,
        task_sigma: Tensor | None = None,
    ) -> None:
        super().__init__(a, b, scale=scale, dropout=dropout)
        self.streams, self.task_scale, self.joint, self.opens = streams, float(task_scale), joint, opens
        self.task_a = None if task_a is None else nn.Parameter(task_a)
        self.task_b = None if task_b is None else nn.Parameter(task_b)
        self.sigma = None if sigma is None else nn.Parameter(sigma)
        self.task_sigma = None if task_sigma is None else nn.Parameter(task_sigma)

    def factors(self) -> tuple[Tensor, Tensor]:
        return (self.a, self.b) if self.sigma is None else (self.a, self.sigma * self.b)

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
            base, read = call(x), dropped(self, x)
            shared = base + _product(read, *self.factors(), self.scale).to(base.dtype)
            streams.base[id(self)] = (base if self.task_a is not None and not self.joint else shared, read)
            return shared
        base, read = streams.base[id(self)]
        if self.task_a is None or self.task_b is None:
            return base
        a, b = self.task_a[streams.stream], _scaled(self.task_b, self.task_sigma)[streams.stream]
        return base + _product(read if self.opens else x, a, b, self.task_scale).to(base.dtype)

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
        opens, task_sigma: as of `MultiTask`.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout", "opens")
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
        opens: bool = False,
        task_sigma: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.task_a, self.task_b = nn.Parameter(task_a), nn.Parameter(task_b)
        self.gain, self.shift = nn.Parameter(gain), nn.Parameter(shift)
        self.streams, self.scale, self.dropout, self.opens = streams, float(scale), float(dropout), opens
        self.task_sigma = None if task_sigma is None else nn.Parameter(task_sigma)

    def dense(self) -> Tensor:
        """The tasks' changes together, before the norm; the streams, not this, make the output."""
        return self.scale * (_scaled(self.task_b, self.task_sigma) @ self.task_a).sum(0)

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        if self.streams.stream != TOGETHER:
            raise ValueError(f"{self.site.path} is made of its tasks' streams, which run in a call of its whole block")
        first, *own = x.unflatten(0, (len(self.streams.tasks) + 1, -1))
        base = call(first)
        read = dropped(self, first).expand(len(own), *first.shape) if self.opens else torch.stack(own)
        change = _product(read.flatten(1, -2), self.task_a, _scaled(self.task_b, self.task_sigma), self.scale)
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
            streams.stage = self.site.path
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


class StreamMerging(Wrapper):
    """A patch merging that the streams of the stage before it go through as well, all in one call of their own.

    Args:
        streams: shared by all parts.
    """

    borrowed: ClassVar[tuple[str, ...]] = ("streams",)

    def __init__(self, streams: TaskStreams) -> None:
        super().__init__()
        self.streams = streams

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        streams, stage = self.streams, self.streams.stage
        if streams.running and stage is not None:
            before = streams.outputs[stage]
            merged = call(torch.cat(list(before.values())), *args[1:], **kwargs).chunk(len(before))
            streams.outputs[stage], streams.stage = dict(zip(before, merged, strict=True)), None
        return call(*args, **kwargs)


class Opened(Rule):
    """Refuses a run in which nobody opens streams: the tasks' factors would never get a gradient."""

    sees_gradients = False

    def gradients(self, run: Run) -> None:
        streams = run.tuned.shared["streams"]
        if isinstance(streams, TaskStreams) and not streams.opened:
            raise ValueError(
                f"{run.tuned.method.slug}: tasks={streams.tasks} train only inside streams(...); leave tasks out, or "
                "write a loop that opens them"
            )


def _scaled(task_b: Tensor, sigma: Tensor | None) -> Tensor:
    """Factors `tasks x out x rank` under the tasks' trained scales."""
    return task_b if sigma is None else sigma[:, None, None] * task_b


def _product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * ((x @ a.to(x.dtype).mT) @ b.to(x.dtype).mT)


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
