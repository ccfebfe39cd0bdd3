"""(IA)^3: PEFT's `IA3`. A vector at a layer's output, or at its input where `feedforward_modules` names it."""

from __future__ import annotations

from typing import Any

import regex
import torch
from torch import Tensor, nn

from ...core.operators.scaling import Scaling
from ...core.part import Part
from ...model.names import matches
from ...model.weights import CONVOLUTIONS, Weight
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse
from .targets import ends_in, named

KIND = "IA3"


def fits(part: Part) -> bool:
    """Whether a part multiplies a layer's inputs or outputs."""
    return isinstance(part, Scaling)


def read(source: Source) -> Plan:
    """An `IA3` folder as an adapter."""
    inputs = source.take("feedforward_modules", None, list, str) or []
    source.flag("fan_in_fan_out")
    source.flag("init_ia3_weights", True)
    targets = source.targets()
    inputs = inputs if isinstance(inputs, str) else frozenset(name for name in inputs if isinstance(name, str))
    inner = [path for path in targets if _named(source, path, inputs)]
    # Whole names, so that a layer whose name ends like one of these is not meant.
    method = source.made(
        "ia3", on=source.on, **({"inputs": [f"{p}$".replace(".", r"\.") for p in inner]} if inner else {})
    )
    for path in targets:
        layer = source.model.get_submodule(path)
        factors = source.tensor(f"{path}.ia3_l").flatten()
        weight = Weight(layer, path=path)
        if isinstance(layer, CONVOLUTIONS) and path in inner:
            refuse(
                source.file, f"feedforward_modules: {path} is a convolution, whose channels are not scaled at the input"
            )
        wanted = weight.fan_in if path in inner else weight.fan_out
        if factors.shape != (wanted,):
            refuse(source.weights, f"{path} has {factors.numel()} factors, where {wanted} are needed")
        source.place(path, "weight", Scaling(factors, at_input=path in inner))
    return source.plan(method)


def _named(source: Source, path: str, names: frozenset[Any] | str) -> bool:
    if isinstance(names, str):
        try:
            return matches(names, path)
        except regex.error as error:
            refuse(source.file, f"feedforward_modules={names!r} is not a regular expression: {error}")
    return ends_in(path, names)


def write(draft: Draft) -> dict[str, Any]:
    """An (IA)^3 adapter as an `IA3` configuration; parts of a fused layer fill their own rows, others stay at one."""
    factors: dict[str, Tensor] = {}
    inner: dict[str, bool] = {}
    for part in draft.parts:
        assert isinstance(part, Scaling)
        path, layer = part.site.path, draft.model.get_submodule(part.site.path)
        if part.site.parameter != "weight" or not isinstance(layer, nn.Module):
            raise draft.refuse(part.site.name, "PEFT's (IA)^3 scales whole layers")
        if part.at_input and (part.site.rows is not None or isinstance(layer, CONVOLUTIONS)):
            raise draft.refuse(part.site.name, "PEFT's (IA)^3 scales the input of a whole linear layer")
        if inner.setdefault(path, part.at_input) != part.at_input:
            raise draft.refuse(part.site.name, "PEFT's (IA)^3 scales a layer at its input or at its output")
        weight = Weight(layer)
        size = weight.fan_in if part.at_input else weight.fan_out
        own = factors.setdefault(path, torch.ones(size, dtype=part.l.dtype))
        rows = slice(None) if part.site.rows is None else list(part.site.rows)
        own[rows] *= part.l.detach().cpu()
    for path, value in factors.items():
        layer: Any = draft.model.get_submodule(path)
        tail = [1] * (layer.weight.dim() - 2) if isinstance(layer, CONVOLUTIONS) else []
        draft.put(f"{path}.ia3_l", value.reshape((1, -1, *tail) if inner[path] or tail else (-1, 1)))
    targets, names = list(factors), named(draft.model, list(factors))
    ends = sorted({path.rpartition(".")[2] for path in targets if inner[path]})
    if names == targets or any(any(path.endswith(end) for end in ends) != inner[path] for path in targets):
        names, ends = targets, [path for path in targets if inner[path]]
    return draft.config(
        KIND,
        target_modules=names,
        feedforward_modules=ends,
        fan_in_fan_out=draft.conv1d(targets),
        init_ia3_weights=True,
        modules_to_save=draft.saved(),
    )
