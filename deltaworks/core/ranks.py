"""Ranks that fall while a method trains: the triplets `l_i p_i q_i^T` of all layers, switched off and dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .experts import kind_of
from .operators.triplet import Triplet, compact
from .operators.two_planes import TwoPlanes
from .rule import Run
from .tuned import Tuned

NAMES = {Triplet.__name__: ("p", "l", "q"), TwoPlanes.__name__: ("left", "e", "right")}


def triplets(tuned: Tuned) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, nn.Parameter]]:
    """Name, P, l, Q of every part (of nested ones the inner factors); fused experts hold theirs stacked."""
    for name, part in tuned.of_kind(Triplet, TwoPlanes):
        p, l, q = (part.get_parameter(key) for key in NAMES[kind_of(part)])
        yield name, p, l, q


def switch_off(tuned: Tuned, chosen: Mapping[str, Tensor]) -> None:
    """Set l to zero where masks, by part, are true."""
    for name, _, l, _ in triplets(tuned):
        l.masked_fill_(chosen[name].to(l.device), 0.0)


def drop(tuned: Tuned, optimizer: Any) -> None:
    """Drop the triplets that are off; the others keep their optimizer state."""
    for _, p, l, q in triplets(tuned):
        compact(p, l, q, optimizer)


def record(run: Run) -> None:
    """Keep every layer's number of triplets that are not off, for the report."""
    run.record("ranks", {name: int((l != 0).sum()) for name, _, l, _ in triplets(run.tuned)})
