"""Trained norms: PEFT's `LN_TUNING`, which saves each norm's parameters whole."""

from __future__ import annotations

from typing import Any

from ...core.part import Part
from ..reading import Plan
from ..sites import find_site
from .draft import Draft
from .source import Source
from .targets import named

KIND = "LN_TUNING"


def fits(part: Part) -> bool:
    """No part that changes a call; trained parameters are dealt with by the draft."""
    return False


def read(source: Source) -> Plan:
    """An `LN_TUNING` folder as an adapter."""
    targets = source.targets()
    method = source.made("layernorm", on=source.on)
    for path in targets:
        for parameter, value in source.model.get_submodule(path)._parameters.items():
            if value is not None:
                source.trained(path, parameter, source.tensor(f"{path}.ln_tuning_layers.{parameter}"))
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """An adapter that only trains norms (and whole modules beside them) as an `LN_TUNING` configuration."""
    kinds = {path: find_site(draft.base, path, own, None).kind for path, own in draft.values}
    norms = [path for path, kind in kinds.items() if kind == "norm"]
    if not norms:
        raise draft.refuse("its parameters", "PEFT keeps trained norms, or whole modules beside another method")
    for path in norms:
        for parameter, value in draft.model.get_submodule(path)._parameters.items():
            if value is not None:
                draft.put(f"{path}.ln_tuning_layers.{parameter}", draft.values.pop((path, parameter), value))
    return draft.config(KIND, target_modules=named(draft.model, norms), modules_to_save=draft.saved())
