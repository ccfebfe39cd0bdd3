"""Rules: what happens around optimisation steps.

A rule listens to six events of a run: `attached`, `step_begin`, `gradients` (complete, before clipping), `step_end`,
`epoch_end`, `finished`. It may add a term to the loss (`penalty`) and it may own the step (`owns_step`). Its whole
memory is in `state_dict`, so that a resumed run continues as if it had not stopped. The same rule runs in a plain loop,
in `transformers.Trainer` and in TRL's trainers; `Run` is what it sees of either.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tuned import Tuned


@dataclass
class Run:
    """A training run, as a rule sees it.

    Attributes:
        tuned: the adapted model.
        optimizer: the optimizer, unwrapped; None until it exists.
        step: number of finished optimizer steps (0 before the first ends).
        total_steps: planned number of optimizer steps.
        seed: the run's seed; rules derive their generators from it.
        history: figures rules record over time, name -> list of (step, value); drawn in the report.
    """

    tuned: Tuned
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    total_steps: int = 0
    seed: int = 0
    history: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)

    def steps(self, time: float) -> int:
        """A time in steps, from a share of the run (below 1) or from steps."""
        return int(time * self.total_steps) if time < 1 else int(time)

    def settings(self) -> dict[int, dict[str, Any]]:
        """The optimizer's settings (`lr`, `betas`, ...) by a parameter's id, for rules that make its step themselves.

        Raises:
            ValueError: when the run has no optimizer.
        """
        if self.optimizer is None:
            raise ValueError(
                f"{self.tuned.method.slug} takes its learning rate from the optimizer; give it to "
                "run(..., optimizer=...)"
            )
        return {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}

    def generator(self, name: str) -> torch.Generator:
        """A generator of this step's own for something in the adapter, so that a resumed run draws the same."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.step} {name}".encode()))

    @property
    def rate(self) -> float:
        """The run's scheduled learning rate: that of the optimizer's first group, without the group's own factor."""
        assert self.optimizer is not None
        return self.optimizer.param_groups[0]["lr"] / self.tuned.parameter_groups(1.0)[0]["lr"]

    @property
    def sampled(self) -> bool:
        """Whether this step is one of about a hundred, the last included, whose figures are worth keeping."""
        return self.step % max(1, self.total_steps // 100) == 0 or self.step == self.total_steps

    def record(self, name: str, value: Any) -> None:
        """Keep a figure of this step for the report."""
        self.history.setdefault(name, []).append((self.step, value))


class Rule:
    """Base of all rules; every event does nothing until a rule says otherwise.

    Class attributes:
        owns_step: the rule replaces forward, backward and optimizer step by `own_step`.
        sees_gradients: it looks at gradients or at what an optimizer makes of them, which must not be scaled then.
        memory: attributes that must survive a restart, `held.smoothed` for one of an object that the rule holds; each
            is a generator, a tensor, a plain value or a container of them, kept under the last piece of its name.
    """

    owns_step: ClassVar[bool] = False
    sees_gradients: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ()

    def attached(self, run: Run) -> None:
        """The adapter is in the model and the run is planned (`total_steps` is known, no step made)."""

    def step_begin(self, run: Run) -> None:
        """Before the first forward pass of an optimizer step (of a whole accumulation window)."""

    def gradients(self, run: Run) -> None:
        """All gradients of the step are accumulated; they are not clipped yet."""

    def step_end(self, run: Run) -> None:
        """After the optimizer's step and `run.step` has grown; gradients are still there."""

    def epoch_end(self, run: Run) -> None:
        """After the last step of an epoch."""

    def finished(self, run: Run) -> None:
        """Training is over; the adapter may take its final, compact form."""

    def resumed(self, run: Run) -> None:
        """After `load_state_dict`: a rule that exchanges parts gives the adapter, and the optimizer's groups, the
        structure they had. The tensors' values are read after this; in a plain loop they may be there already."""

    def penalty(self, run: Run) -> Tensor | None:
        """A term added to the loss of every forward pass, or None."""
        return None

    def own_step(self, run: Run, loss: Callable[[], Tensor], lr: float) -> Tensor:
        """For rules that own the step: make it, and return the loss.

        Args:
            run: the run.
            loss: computes the loss of this step's batch, without gradient, as often as called.
            lr: the scheduled learning rate.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it owns the step but makes none")

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a restart: tensors and plain values."""
        kept = {_key(path): attrgetter(path)(self) for path in self.memory}
        return {key: v.get_state() if isinstance(v, torch.Generator) else v for key, v in kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state_dict`'s content.

        Raises:
            ValueError: when it is not this rule's.
        """
        if set(state) != {_key(path) for path in self.memory}:
            wanted = sorted(_key(path) for path in self.memory) or "no state"
            raise ValueError(f"{type(self).__name__} keeps {wanted} but was given {sorted(state)}")
        for path in self.memory:
            value = attrgetter(path)(self)
            if isinstance(value, torch.Generator):
                value.set_state(state[_key(path)])
            else:
                holder, _, name = path.rpartition(".")
                setattr(attrgetter(holder)(self) if holder else self, name, _copied(state[_key(path)]))


def _key(path: str) -> str:
    return path.rpartition(".")[2]


def _copied(value: Any) -> Any:
    """Containers anew, so that a rule does not write into the state it was given; tensors as they are."""
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return type(value)(_copied(one) for one in value) if type(value) in (list, tuple) else value


def pooled(values: Iterable[Tensor]) -> Tensor:
    """The entries of some tensors, which may lie on several devices, as one vector: for terms of the loss."""
    every = [value.reshape(-1) for value in values]
    return torch.cat([value.to(every[0].device) for value in every])


class Rules:
    """Several rules as one: what a trainer calls."""

    def __init__(self, rules: list[Rule], run: Run) -> None:
        self.rules, self.run = rules, run
        owners = [type(rule).__name__ for rule in rules if rule.owns_step]
        if len(owners) > 1:
            raise ValueError(f"only one rule can own the step; {' and '.join(owners)} both do")

    @property
    def owner(self) -> Rule | None:
        """The rule that owns the step, if one does."""
        return next((rule for rule in self.rules if rule.owns_step), None)

    def emit(self, event: str) -> None:
        """Tell every rule of an event; `step_end` counts the step first."""
        if event == "step_end":
            self.run.step += 1
        for rule in self.rules:
            getattr(rule, event)(self.run)

    def penalty(self) -> Tensor | None:
        """The sum of the rules' loss terms, None if there is none."""
        terms = [term for rule in self.rules if (term := rule.penalty(self.run)) is not None]
        return torch.stack([term.reshape(()) for term in terms]).sum() if terms else None

    def step(self, loss: Callable[[], Tensor], *, clip: float = 0.0) -> Tensor:
        """One optimizer step of a plain loop: forward, backward and update, with all that the rules do in between.

        Gradients are gone afterwards; a learning-rate schedule goes on after this.

        Args:
            loss: computes the loss of this step's batch; a rule that owns the step calls it as often as it needs.
            clip: the largest norm of all gradients together, 0 for any.

        Returns:
            The loss, detached, without the rules' terms.

        Raises:
            ValueError: when the run has no optimizer.
        """
        optimizer = self.run.optimizer
        if optimizer is None:
            raise ValueError("a step needs an optimizer; give it to run(..., optimizer=...)")
        self.emit("step_begin")
        if self.owner is not None:
            with torch.no_grad():
                value = self.owner.own_step(self.run, loss, self.run.rate)
        else:
            value, penalty = loss(), self.penalty()
            (value if penalty is None else value + penalty.to(value.device)).backward()
            self.emit("gradients")
            if clip:
                torch.nn.utils.clip_grad_norm_(self.run.tuned.parameters(), clip)
            optimizer.step()
        self.emit("step_end")
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def state_dict(self) -> dict[str, Any]:
        """State of the run and of every rule, in order."""
        return {
            "step": self.run.step,
            "history": self.run.history,
            "rules": [{"kind": type(rule).__name__, "state": rule.state_dict()} for rule in self.rules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state_dict`'s content; the rules must be the same, in the same order."""
        kinds = [item["kind"] for item in state["rules"]]
        if kinds != [type(rule).__name__ for rule in self.rules]:
            raise ValueError(
                f"the checkpoint has rules {kinds}, the run {[type(rule).__name__ for rule in self.rules]}"
            )
        self.run.step, self.run.history = state["step"], state["history"]
        for rule, item in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(item["state"])
            rule.resumed(self.run)
