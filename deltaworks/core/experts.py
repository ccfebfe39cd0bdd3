"""The same delta for every expert of a fused parameter (`experts x out x in`).

A page says what it does to one matrix. Here the tensors of all experts' deltas are stacked, and the one definition is
mapped over the stack, so no page knows that experts exist.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .part import PARTS, Delta, Part, heard

if TYPE_CHECKING:
    from ..model.weights import Weight


LARGEST = 1 << 16
"""Experts that a file may say there are; nothing else bounds the number where a stack has no tensors of its own."""


class PerExpert(Delta):
    """One delta an expert, stacked along a leading axis.

    Args:
        deltas: one delta for each expert, all of one kind and size.
    """

    settings: ClassVar[tuple[str, ...]] = ("kind", "count", "inner")
    prototype: Delta

    def __init__(self, deltas: list[Delta]) -> None:
        super().__init__()
        self.kind, self.count, self.inner = type(deltas[0]).__name__, len(deltas), deltas[0].configuration()
        first = deltas[0]
        # Kept out of the module tree: its tensors are only placeholders for the stacked ones.
        self.__dict__["prototype"] = copy.deepcopy(first).to("meta")
        # What is true of every expert's delta is true of the stack.
        of_each = ("additive", "mergeable", "replaces", "borrowed")
        self.__dict__.update({name: getattr(first, name) for name in of_each})
        # What deltas borrow is one module for all experts: held once, not stacked, left out of files.
        for name in first.borrowed:
            self.add_module(name, first.get_submodule(name))
        lent = tuple(f"{name}." for name in first.borrowed)
        for name, value in first.named_parameters():
            if name.startswith(lent):
                continue
            stacked = torch.stack([delta.get_parameter(name).detach() for delta in deltas])
            self.register_parameter(name.replace(".", "__"), nn.Parameter(stacked, requires_grad=value.requires_grad))
        for name, _ in first.named_buffers():
            if not name.startswith(lent):
                self._stack(name, deltas, persistent=name in first.state_dict())

    @classmethod
    def remade(cls, settings: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, nn.Module]) -> Part:
        kind, count, inner = settings.get("kind"), settings.get("count"), settings.get("inner")
        known = PARTS.get(kind) if isinstance(kind, str) else None
        if known is None or not issubclass(known, Delta) or known is PerExpert or not isinstance(inner, dict):
            raise ValueError(f"a stack of {kind!r} is not known")
        if not isinstance(count, int) or not 0 < count <= LARGEST:
            raise ValueError(f"a stack of {count!r} experts is none of 1 to {LARGEST}")
        if any(value.dim() == 0 or value.shape[0] != count for value in tensors.values()):
            raise ValueError(f"the stacked tensors do not all have {count} experts")
        made = [
            known.remade(inner, {n.replace("__", "."): v[i] for n, v in tensors.items()}, shared) for i in range(count)
        ]
        return cls([delta for delta in made if isinstance(delta, Delta)])

    def each(self) -> list[Delta]:
        """Every expert's delta by itself, with copies of its tensors."""
        lent: dict[str, nn.Module] = {name: self.get_submodule(name) for name in self.borrowed}
        own = {name.replace("__", "."): value.clone() for name, value in self.tensors().items()}
        made = [PARTS[self.kind].remade(self.inner, {n: v[i] for n, v in own.items()}, lent) for i in range(self.count)]
        return [delta for delta in made if isinstance(delta, Delta)]

    def _stack(self, name: str, deltas: list[Delta], persistent: bool) -> None:
        stacked = torch.stack([delta.get_buffer(name) for delta in deltas])
        self.register_buffer(name.replace(".", "__"), stacked, persistent=persistent)

    def settle(self, weight: Weight) -> None:
        if type(self.prototype).settle is Delta.settle:
            return
        from .method import experts_of

        deltas = self.each()
        for delta, own in zip(deltas, experts_of(weight), strict=True):
            delta.settle(own)
        for name in {name for name, _ in deltas[0].named_buffers()} - set(deltas[0].state_dict()):
            if name.partition(".")[0] not in self.borrowed and name.replace(".", "__") not in self._buffers:
                self._stack(name, deltas, persistent=False)

    def _own(self) -> dict[str, Tensor]:
        own: dict[str, Any] = {**self._parameters, **self._buffers}
        return {f"delta.{name.replace('__', '.')}": value for name, value in own.items()}

    def _lent(self) -> dict[str, Tensor]:
        lent: dict[str, Tensor] = {}
        for name in self.borrowed:
            module = self.get_submodule(name)
            lent |= {f"delta.{name}.{inner}": t for inner, t in (*module.named_parameters(), *module.named_buffers())}
        return lent

    def dense(self) -> Tensor:
        call, own, lent = _Dense(self.prototype), self._own(), self._lent()
        if not own:  # all of it is borrowed, so the experts have one change in common
            change = functional_call(call, lent, ())
            return heard(self.watch, change.expand(self.count, *change.shape))
        return heard(self.watch, torch.vmap(lambda own: functional_call(call, {**own, **lent}, ()))(own))

    def fold(self, weight: Tensor) -> Tensor:
        if self.prototype.additive:
            return super().fold(weight)
        call, lent = _Fold(self.prototype), self._lent()
        return torch.vmap(lambda own, w: functional_call(call, {**own, **lent}, (w,)))(self._own(), weight)


def kind_of(part: Part) -> str:
    """The name of a part's class; of a stack, that of what it stacks, whose tensors it holds under their own names."""
    return part.kind if isinstance(part, PerExpert) else type(part).__name__


def mapped(part: Any, change: Callable[[Any], Delta]) -> Delta:
    """What a change makes of a delta; of a stack, the stack of what it makes of each."""
    return PerExpert([change(one) for one in part.each()]) if isinstance(part, PerExpert) else change(part)


def setting(part: Part, key: str, default: Any = None) -> Any:
    """A plain constructor argument of a part, or of each in a stack."""
    return part.inner.get(key, default) if isinstance(part, PerExpert) else getattr(part, key, default)


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
