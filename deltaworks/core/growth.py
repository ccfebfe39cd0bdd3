"""Layers that grow while a method trains, the most deserving first, until they have some rank on average."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .moments import refuse_sharing
from .operators.triplet import orthogonality
from .part import Part
from .rule import Rule, Run


class GrowingRanks(Rule):
    """Base of rules that let layers grow at checks; a page says what a layer's rank is, and who grows by what.

    Class attributes:
        kind: of the parts that grow.

    Args:
        method: its `warmup` is the time before the first check, its `gamma` weighs the factors' distance from
            orthogonality, which is added to the loss.
        target: rank of the layers on average at which growth ends.
    """

    kind: ClassVar[type[Part]]

    def __init__(self, method: Any, target: int) -> None:
        self.method, self.target = method, target

    def factors(self, part: Any) -> tuple[Tensor, Tensor]:
        """The factors that should be orthogonal, `... out x rank` and `... rank x in`."""
        raise NotImplementedError

    def rank(self, part: Any) -> int:
        """The rank that a part has."""
        return self.factors(part)[1].shape[-2]

    def interval(self, run: Run) -> int:
        """Steps between two checks."""
        raise NotImplementedError

    def grow(self, parts: dict[str, Any], missing: int, run: Run) -> None:
        """Let some of the parts grow, by name, where this many ranks are missing."""
        raise NotImplementedError

    def attached(self, run: Run) -> None:
        refuse_sharing(run.tuned.method.slug)

    def parts(self, run: Run) -> dict[str, Any]:
        """Every part that grows, by name."""
        return dict(run.tuned.of_kind(self.kind))

    def missing(self, run: Run) -> int:
        """How many ranks all layers together are short of."""
        return sum(self.target - self.rank(part) for part in self.parts(run).values())

    def first(self, run: Run) -> int:
        """The first step at which a check is due."""
        return (run.steps(self.method.warmup) // self.interval(run) + 1) * self.interval(run)

    @torch.no_grad()
    def check(self, run: Run, step: int) -> None:
        """Let layers grow if it is time to, and keep their ranks for the report."""
        parts, missing = self.parts(run), self.missing(run)
        due = missing > 0 and step > run.steps(self.method.warmup) and step % self.interval(run) == 0
        if due:
            self.grow(parts, missing, run)
        if due or run.sampled:
            run.record("ranks", {name: self.rank(part) for name, part in parts.items()})

    def penalty(self, run: Run) -> Tensor | None:
        pairs = (self.factors(part) for part in self.parts(run).values())
        return self.method.gamma * orthogonality(pairs) if self.method.gamma else None
