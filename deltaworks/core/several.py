"""Several methods as one adapter: each has its own parts, rules and optimizer groups, known by their labels.

A part's label says whose it is (`lora__weight`), so one set of parts is saved, loaded and trained like any other. A
method's rules see its own parts only, through `Member`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .method import Method
from .part import Part
from .rule import Rule, Run
from .tuned import Tuned

MARK = "__"


def owner(name: str) -> str | None:
    """Whose a tensor or part is, from its full name; None for what has no label, such as a parameter of the base."""
    marked = [piece.partition(MARK)[0] for piece in name.split(".") if piece.partition(MARK)[0] and MARK in piece]
    return marked[-1] if marked else None


class Member(Tuned):
    """What one of several methods sees of the adapter that it is part of.

    Args:
        whole: the adapter.
        slug: of the method.
        method: the method as it was attached.
    """

    def __init__(self, whole: Tuned, slug: str, method: Method) -> None:
        super().__init__(whole.model, whole.name)
        self.slug, self._method = slug, method

    @property
    def method(self) -> Method:
        return self._method

    def named_parts(self) -> Iterator[tuple[str, Part]]:
        return ((name, part) for name, part in super().named_parts() if owner(name) == self.slug)

    def parts(self) -> Iterator[Part]:
        return (part for _, part in self.named_parts())

    def _forget(self) -> None:
        Tuned(self.model, self.name)._forget()


class Within(Rule):
    """A method's rule, which sees that method's parts only.

    Args:
        rule: the method's.
        slug, method: whose.
    """

    def __init__(self, rule: Rule, slug: str, method: Method) -> None:
        self.rule, self.slug, self.method = rule, slug, method
        self.owns_step = rule.owns_step  # type: ignore[misc]

    def _seen(self, run: Run) -> Run:
        return dataclasses.replace(run, tuned=Member(run.tuned, self.slug, self.method))

    def attached(self, run: Run) -> None:
        self.rule.attached(self._seen(run))

    def step_begin(self, run: Run) -> None:
        self.rule.step_begin(self._seen(run))

    def gradients(self, run: Run) -> None:
        self.rule.gradients(self._seen(run))

    def step_end(self, run: Run) -> None:
        self.rule.step_end(self._seen(run))

    def epoch_end(self, run: Run) -> None:
        self.rule.epoch_end(self._seen(run))

    def finished(self, run: Run) -> None:
        self.rule.finished(self._seen(run))

    def resumed(self, run: Run) -> None:
        self.rule.resumed(self._seen(run))

    def penalty(self, run: Run) -> Tensor | None:
        return self.rule.penalty(self._seen(run))

    def own_step(self, run: Run, loss: Callable[[], Tensor], lr: float) -> Tensor:
        return self.rule.own_step(self._seen(run), loss, lr)

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state)
