"""Budgets that change over a run, and runs that begin anew several times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from .moments import restart
from .rule import Rule, Run


def window(run: Run, **times: float) -> tuple[int, int]:
    """The last step before a window in the run, and its last step.

    Args:
        run: whose length is known.
        times: what comes before the window and what comes after, as `Run.steps` reads times, by hyper-parameter.

    Raises:
        ValueError: when they leave no step between them.
    """
    before, after = (run.steps(time) for time in times.values())
    if before + after >= max(run.total_steps, 1):
        raise ValueError(
            f"{run.tuned.method.slug}: {' and '.join(times)} take {before} and {after} steps; "
            f"their sum must be below the run's {run.total_steps}"
        )
    return before, run.total_steps - after


def cubic(step: int, first: int, last: int) -> float:
    """What is left of a budget at a step: all until `first`, `(1 - t)^3` in the window, nothing after `last`."""
    return 1.0 if step <= first else 0.0 if step > last else (1 - (step - first) / (last - first)) ** 3


def rise(done: int, warmup: int) -> float:
    """The share of its learning rate at which a warm-up makes its next step; whole after `warmup` steps."""
    return min(1.0, (done + 1) / (warmup + 1))


class Links(Rule):
    """Base of rules that train one link after the other.

    At the end of a link a page puts aside what it learnt, as a constant. The next one begins with an optimizer that
    remembers nothing of it, and at a learning rate of its own, of which the run's schedule does not know.

    Attributes:
        tied: number of finished links.
    """

    memory: ClassVar[tuple[str, ...]] = ("tied",)

    def __init__(self) -> None:
        self.tied = 0

    def ends(self, run: Run) -> list[int]:
        """The steps after which links are complete, rising; the last link is as long as the run."""
        raise NotImplementedError

    def rate(self, group: dict[str, Any], done: int, length: int) -> float:
        """A group's learning rate in the next step of a link, of whose `length` steps some are `done`."""
        raise NotImplementedError

    def tie(self, run: Run) -> Iterator[nn.Parameter]:
        """Put aside what the link learnt and begin the next; gives the parameters that do."""
        raise NotImplementedError

    def gradients(self, run: Run) -> None:
        if run.optimizer is not None:
            begin, end = [0, *self.ends(run), run.total_steps][self.tied : self.tied + 2]
            for group in run.optimizer.param_groups:
                group.setdefault("scheduled", group["lr"])  # by the first, if there are several such rules
                group["lr"] = self.rate(group, run.step - begin, end - begin)

    def step_end(self, run: Run) -> None:
        for group in run.optimizer.param_groups if run.optimizer is not None else ():
            group["lr"] = group.pop("scheduled", group["lr"])
        ends = self.ends(run)
        if self.tied < len(ends) and run.step in ends:
            with torch.no_grad():
                for parameter in self.tie(run):
                    restart(parameter, run.optimizer)
            self.tied += 1
            run.record(f"{run.tuned.method.slug}.knots", self.tied)
