"""Slices of a parameter that began later than the rest, and learn at a rate of their own.

The optimizer steps the whole parameter at one rate and with one count of steps. What it moves the newcomers by is then
scaled to what a group of their own, with a schedule and a count that began with them, would have moved them by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .moments import grow, keep, unwrapped, younger

Parts = Mapping[str, nn.Module]


class Newcomers:
    """Who began when.

    Args:
        dims: of each tensor of a part, the dimension along which its slices have ages.

    Attributes:
        births: by `<part>.<tensor>` for every slice the optimizer step after which it began, 0 for those of the start.
    """

    def __init__(self, dims: Mapping[str, int]) -> None:
        self.dims = dims
        self.births: dict[str, list[int]] = {}
        self._before: dict[str, Tensor] = {}

    def tensors(self, parts: Parts) -> Iterator[tuple[str, nn.Parameter, int]]:
        """`<part>.<tensor>`, the tensor and its dimension."""
        for name, part in parts.items():
            yield from ((f"{name}.{key}", part.get_parameter(key), dim) for key, dim in self.dims.items())

    def know(self, parts: Parts) -> None:
        """Take parts that are not known yet for there from the start."""
        for key, parameter, dim in self.tensors(parts):
            self.births.setdefault(key, [0] * parameter.shape[dim])

    def grow(self, name: str, part: nn.Module, new: Mapping[str, Tensor], step: int, optimizer: Any) -> None:
        """Put new slices of its tensors at the end of a part's, after a step."""
        for key, slices in new.items():
            grow(part.get_parameter(key), slices, self.dims[key], optimizer)
            self.births[f"{name}.{key}"] += [step] * slices.shape[self.dims[key]]

    def cut(self, name: str, part: nn.Module, number: int, optimizer: Any) -> None:
        """Leave the first slices of a part's tensors."""
        for key, parameter, dim in self.tensors({name: part}):
            if parameter.shape[dim] > number:
                keep(parameter, torch.arange(number), dim, optimizer)
                del self.births[key][number:]

    def _young(self, key: str, parameter: Tensor) -> Tensor:
        return torch.tensor([i for i, birth in enumerate(self.births[key]) if birth], device=parameter.device)

    @torch.no_grad()
    def hold(self, parts: Parts) -> None:
        """Before the optimizer's step: keep the newcomers' values."""
        self._before = {
            key: parameter.index_select(dim, self._young(key, parameter))
            for key, parameter, dim in self.tensors(parts)
            if any(self.births[key])
        }

    @torch.no_grad()
    def pace(self, parts: Parts, optimizer: Any, step: int, rate: Callable[[int, int], float]) -> None:
        """After the optimizer's step: scale what it moved the newcomers by.

        Args:
            parts: those given to `hold`.
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
        for key, parameter, dim in self.tensors(parts):
            if key not in self._before:
                continue
            old, group, young = self._before[key], groups[id(parameter)], self._young(key, parameter)
            shares = []
            for birth in (birth for birth in self.births[key] if birth):
                share = rate(birth, step) * group.get("initial_lr", group["lr"]) / group["lr"] if group["lr"] else 0.0
                shares.append(share * younger(parameter, inner, step - birth + 1))
            shape = [1] * parameter.dim()
            shape[dim] = len(shares)
            share = torch.tensor(shares, dtype=old.dtype, device=old.device).view(shape)
            parameter.index_copy_(dim, young, old + (parameter.index_select(dim, young) - old) * share)
        self._before = {}
