"""HRA: PEFT's `HRA`, which has no penalty."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.operators.rotation import Householder
from ...core.part import Part
from ..reading import Plan
from .draft import Draft
from .source import Source
from .targets import named

KIND = "HRA"


def fits(part: Part) -> bool:
    """Whether a part is HRA's."""
    return isinstance(part, Householder)


def read(source: Source) -> Plan:
    """An `HRA` folder as an adapter."""
    rank, strict = source.whole("r", 8), source.flag("apply_GS")
    source.flag("init_weights", True)
    targets = source.targets()
    method = source.made("hra", on=source.on, rank=rank, strict=strict, penalty=0.0)
    for path in targets:
        u = source.shaped(f"{path}.hra_u", source.weight(path, nn.Linear, nn.Conv2d).fan_in, rank)
        source.place(path, "weight", Householder(u, orthogonal=strict))
    source.biases(targets, "hra_only")
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """An adapter of reflections as an `HRA` configuration."""
    ranks, strict = [], []
    for part in draft.parts:
        assert isinstance(part, Householder)
        draft.put(f"{draft.layer(part, nn.Linear, nn.Conv2d)}.hra_u", part.u)
        ranks.append(part.u.shape[1])
        strict.append(part.orthogonal)
    targets = [part.site.path for part in draft.parts]
    return draft.config(
        KIND,
        r=draft.one("rank", ranks),
        apply_GS=draft.one("strict", strict),
        init_weights=True,
        target_modules=named(draft.model, targets),
        bias=draft.biases(targets, "hra_only"),
        modules_to_save=draft.saved(),
    )
