"""The same delta for every expert of a fused parameter (`experts x out x in`).

A page says what it does to one matrix. Here the tensors of all experts' deltas are stacked, and the one definition is
mapped over the stack, so no page knows that experts exist.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .part import PARTS, Delta, Part


class PerExpert(Delta):
    """One delta an expert, stacked along a leading axis.

    Args:
        deltas: one delta for each expert, all of one kind and size.
    """

    settings: ClassVar[tuple[str, ...]] = ("kind", "count", "inner")

    def __init__(self, deltas: list[Delta]) -> None:
        super().__init__()
        self.kind, self.count, self.inner = type(deltas[0]).__name__, len(deltas), deltas[0].configuration()
        first = deltas[0]
        # Kept out of the module tree: its tensors are only placeholders for the stacked ones.
        self.__dict__["prototype"] = copy.deepcopy(first).to("meta")
        for name, value in first.named_parameters():
            stacked = torch.stack([delta.get_parameter(name).detach() for delta in deltas])
            self.register_parameter(name.replace(".", "__"), nn.Parameter(stacked, requires_grad=value.requires_grad))
        for name, _ in first.named_buffers():
            self.register_buffer(name.replace(".", "__"), torch.stack([delta.get_buffer(name) for delta in deltas]))

    @classmethod
    def remade(cls, settings: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, nn.Module]) -> Part:
        kind, count, inner = settings.get("kind"), settings.get("count"), settings.get("inner")
        known = PARTS.get(kind) if isinstance(kind, str) else None
        if known is None or not issubclass(known, Delta) or known is PerExpert or not isinstance(inner, dict):
            raise ValueError(f"a stack of {kind!r} is not known")
        if any(value.dim() == 0 or value.shape[0] != count for value in tensors.values()) or not tensors:
            raise ValueError(f"the stacked tensors do not all have {count} experts")
        made = [
            known.remade(inner, {n.replace("__", "."): v[i] for n, v in tensors.items()}, shared)
            for i in range(len(next(iter(tensors.values()))))
        ]
        return cls([delta for delta in made if isinstance(delta, Delta)])

    def _own(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name.replace("__", "."): value for name, value in own.items()}

    def dense(self) -> Tensor:
        return torch.vmap(lambda own: functional_call(_Dense(self.prototype), _prefixed(own), ()))(self._own())

    def fold(self, weight: Tensor) -> Tensor:
        if self.prototype.additive:
            return super().fold(weight)
        return torch.vmap(lambda own, w: functional_call(_Fold(self.prototype), _prefixed(own), (w,)))(self._own(), weight)


def _prefixed(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"delta.{name}": value for name, value in own.items()}


class _Dense(nn.Module):
    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.delta = delta

    def forward(self) -> Tensor:
        return self.delta.dense()


class _Fold(nn.Module):
    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return self.delta.fold(weight)
