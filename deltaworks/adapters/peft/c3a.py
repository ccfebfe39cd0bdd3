"""C3A: PEFT's `C3A`, whose product is divided by the width of the layer's input."""

from __future__ import annotations

import math
from typing import Any

from ...core.operators.circulant import Circulant
from ...core.part import Part
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse
from .targets import named, pattern_for, patterns

KIND = "C3A"
METHOD = "c3a"
STARTS = {
    "xavier_uniform": "xavier",
    "kaiming_uniform": "kaiming",
    "gaussian": "normal",
    True: "zeros",
    False: "xavier",
}


def fits(part: Part) -> bool:
    """Whether a part is C3A's."""
    return isinstance(part, Circulant)


def read(source: Source) -> Plan:
    """A `C3A` folder as an adapter."""
    block, own = source.whole("block_size", 256), source.patterns("block_size_pattern", int)
    start = source.take("init_weights", "xavier_uniform", str, bool)
    if start not in STARTS:
        refuse(source.file, f"init_weights={start!r} is not known")
    targets = source.targets()
    overrides = {pattern: {"block": value} for pattern, value in own.items()}
    method = source.made("c3a", on=source.on, block=block, init=STARTS[start], overrides=overrides)
    for path in targets:
        weight = source.weight(path)
        side = pattern_for(own, path, block)
        kernel = source.tensor(f"{path}.c3a_kernel")
        if kernel.dim() != 3 or kernel.shape[-1] != side:
            refuse(
                source.weights, f"{path} has blocks of {list(kernel.shape)}, where {source.file.name} says side {side}"
            )
        source.place(path, "weight", Circulant(kernel, scale=1 / weight.fan_in))
    source.biases(targets, "c3a_only")
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """A C3A adapter as a `C3A` configuration."""
    sides = {}
    for part in draft.parts:
        assert isinstance(part, Circulant)
        path = draft.layer(part)
        if part.dropout:
            raise draft.refuse(f"dropout={part.dropout}", "PEFT's C3A has none")
        factor = part.scale * part.w.shape[1] * part.block
        same = math.isclose(factor, 1.0, rel_tol=1e-12)
        draft.put(f"{path}.c3a_kernel", part.w if same else part.w.detach() * factor)
        sides[path] = part.block
    block, own = patterns(sides)
    targets = list(sides)
    names = {ours: theirs for theirs, ours in STARTS.items() if theirs is not False}
    return draft.config(
        KIND,
        block_size=block,
        block_size_pattern=own,
        target_modules=named(draft.model, targets),
        init_weights=names[getattr(draft.method, "init", "xavier")],
        bias=draft.biases(targets, "c3a_only"),
        modules_to_save=draft.saved(),
    )
