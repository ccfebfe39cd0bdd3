"""BOFT: PEFT's `BOFT`. Without its compiled extension PEFT takes one stage, whatever a file says."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from ...core.operators.rotation import Butterfly
from ...core.part import Part
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse
from .targets import named, patterns

KIND = "BOFT"


def fits(part: Part) -> bool:
    """Whether a part is BOFT's."""
    return isinstance(part, Butterfly)


def read(source: Source) -> Plan:
    """A `BOFT` folder as an adapter; its tensors say how many stages were trained."""
    side, count = source.take("boft_block_size", 4, int), source.take("boft_block_num", 0, int)
    stages = source.whole("boft_n_butterfly_factor", 1)
    source.flag("fan_in_fan_out")
    source.flag("init_weights", True)
    dropout = source.number("boft_dropout", 0.0)
    if (side > 0) == (count > 0):
        refuse(source.file, f"boft_block_size={side} and boft_block_num={count}: one of them must be above 0")
    sides, found = {}, set()
    targets = source.targets()
    for path in targets:
        weight = source.weight(path, nn.Linear, nn.Conv2d)
        sides[path] = b = side or weight.fan_in // count
        p = source.tensor(f"{path}.boft_R")
        if p.dim() != 4 or p.shape[0] not in (1, stages) or tuple(p.shape[1:]) != (weight.fan_in // b, b, b):
            wanted = f"{stages} stages of {weight.fan_in // b} blocks of {b} x {b}"
            refuse(source.weights, f"{path}.boft_R has shape {list(p.shape)}, where {source.file.name} says {wanted}")
        s = source.tensor(f"{path}.boft_s").flatten()
        found.add(p.shape[0])
        source.place(path, "weight", Butterfly(p, s, dropout))
    if len(found) > 1:
        refuse(source.weights, f"holds layers of different numbers of stages: {sorted(found)}")
    block, own = patterns(sides)
    overrides = {re.escape(name): {"block": value} for name, value in own.items()}
    method = source.made("boft", on=source.on, block=block, stages=found.pop(), dropout=dropout, overrides=overrides)
    source.biases(targets, "boft_only")
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """An adapter of butterflies as a `BOFT` configuration."""
    stages, sides, counts, dropouts = [], [], [], []
    for part in draft.parts:
        assert isinstance(part, Butterfly)
        path = draft.layer(part, nn.Linear, nn.Conv2d)
        draft.put(f"{path}.boft_R", part.p)
        lying = isinstance(draft.model.get_submodule(path), nn.Conv2d)
        draft.put(f"{path}.boft_s", part.s.unsqueeze(0 if lying else 1))
        stages.append(part.p.shape[0])
        sides.append(part.p.shape[-1])
        counts.append(part.p.shape[1])
        dropouts.append(part.dropout)
    if max(stages) > 1:
        warnings.warn(f"PEFT reads stages={max(stages)} only where its CUDA extension is compiled", stacklevel=4)
    by_number = len(set(sides)) > 1 and len(set(counts)) == 1
    targets = [part.site.path for part in draft.parts]
    return draft.config(
        KIND,
        boft_block_size=0 if by_number else draft.one("block", sides),
        boft_block_num=counts[0] if by_number else 0,
        boft_n_butterfly_factor=draft.one("stages", stages),
        boft_dropout=draft.one("dropout", dropouts),
        fan_in_fan_out=False,
        init_weights=True,
        target_modules=named(draft.model, targets),
        bias=draft.biases(targets, "boft_only"),
        modules_to_save=draft.saved(),
    )
