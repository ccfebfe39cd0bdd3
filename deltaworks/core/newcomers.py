"""Slices of a parameter that began later than the rest, and learn at a rate of their own.

The optimizer steps the whole parameter at one rate and with one count of steps. What it moves the newcomers by is then
scaled to what a group of their own, with a schedule and a count that began with them, would have moved them by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .moments import unwrapped, younger

Placed = tuple[nn.Parameter, int]
"""A parameter and the dimension along which its slices have ages."""


class Newcomers:
    """Who began when, by key of a parameter.

    Attributes:
        births: for every slice the optimizer step after which it began, 0 for those of the start.
    """

    def __init__(self) -> None:
        self.births: dict[str, list[int]] = {}
        self._before: dict[str, Tensor] = {}

    def know(self, parameters: Mapping[str, Placed]) -> None:
        """Take parameters that are not known yet for there from the start."""
        for key, (parameter, dim) in parameters.items():
            self.births.setdefault(key, [0] * parameter.shape[dim])

    def add(self, key: str, number: int, step: int) -> None:
        """Slices were put at the end."""
        self.births[key] += [step] * number

    def cut(self, key: str, number: int) -> None:
        """Only the first slices are left."""
        del self.births[key][number:]

    def _young(self, key: str, parameter: Tensor) -> Tensor:
        return torch.tensor([i for i, birth in enumerate(self.births[key]) if birth], device=parameter.device)

    @torch.no_grad()
    def hold(self, parameters: Mapping[str, Placed]) -> None:
        """Before the optimizer's step: keep the newcomers' values."""
        self._before = {
            key: parameter.index_select(dim, self._young(key, parameter))
            for key, (parameter, dim) in parameters.items()
            if any(self.births[key])
        }

    @torch.no_grad()
    def pace(
        self, parameters: Mapping[str, Placed], optimizer: Any, step: int, rate: Callable[[int, int], float]
    ) -> None:
        """After the optimizer's step: scale what it moved the newcomers by.

        Args:
            parameters: those given to `hold`.
            optimizer: that made the step, wrapped or not.
            step: the number of steps made before this one.
            rate: of a slice's birth and of `step`, the slice's learning rate over the highest of the run.

        Raises:
            ValueError: without an optimizer.
        """
        inner = unwrapped(optimizer)
        if inner is None:
            raise ValueError("new slices learn at rates of their own; give the optimizer to run(..., optimizer=...)")
        groups = {id(p): group for group in inner.param_groups for p in group["params"]}
        for key, old in self._before.items():
            parameter, dim = parameters[key]
            group, young = groups[id(parameter)], self._young(key, parameter)
            shares = []
            for birth in (birth for birth in self.births[key] if birth):
                share = rate(birth, step) * group.get("initial_lr", group["lr"]) / group["lr"] if group["lr"] else 0.0
                shares.append(share * younger(parameter, inner, step - birth + 1))
            shape = [1] * parameter.dim()
            shape[dim] = len(shares)
            share = torch.tensor(shares, dtype=old.dtype, device=old.device).view(shape)
            parameter.index_copy_(dim, young, old + (parameter.index_select(dim, young) - old) * share)
        self._before = {}
