"""An override changes what is made at its place, or is refused: none is accepted and ignored.

What rules read in training is not seen here; pages say that it is one for all places (`everywhere`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.model.anatomy import describe
from tests.conformance.subject import batches, build

PLACE = "layers.0.self_attn.v_proj"
# What acts only beside other settings, at convolutions, at biases, or where a layer has several blocks.
ELSEWHERE = {"fourierft": {"width"}, "glora": {"d"}, "loha": {"tucker"}, "lokr": {"both", "tucker"}, "oft": {"share"}}
METHODS = [slug for slug, cls in dw.methods().items() if cls.overridable]


def others(item: dataclasses.Field, value: Any) -> Iterator[Any]:
    """Values that a hyper-parameter may have instead."""
    named = item.metadata["wanted"].removeprefix("one of ").split(", ")
    numbers = (value * 2, value + 1, value / 2) if isinstance(value, (int, float)) else ()
    for one in (*numbers, *named, 2, 3, 0.5, 0.25, True, False, None):
        one = int(one) if isinstance(value, int) and isinstance(one, float) and one.is_integer() else one
        if one != value and item.metadata["check"](one) is None:
            yield one


def made(method: Method) -> Any:
    """What is put at the place, and how its tensors train."""
    model, _ = build("llama")
    base = describe(model)
    measured = method.measure(base, batches("llama")) if method.needs_data else None
    torch.manual_seed(0)
    found = []
    for placed in method.parts(base, method.shared(base), measured):
        if placed.site.path.endswith(PLACE):
            part = placed.part
            tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
            values = {name: (list(value.shape), value.tolist()) for name, value in tensors.items()}
            path = f"{placed.site.path}.{placed.label}"
            groups = {name: method.group_of(f"{path}.{name}") for name in tensors if "." not in name}
            found.append((type(part).__name__, {name: getattr(part, name) for name in part.settings}, values, groups))
    return found


@pytest.mark.parametrize("slug", METHODS)
def test_no_override_is_ignored(slug: str) -> None:
    plain = dw.method(slug)
    usual = made(plain)
    assert usual, f"{slug} has nothing at {PLACE}"
    ignored = []
    for item in dataclasses.fields(plain):
        if item.name in ("on", "overrides", *plain.everywhere):
            with pytest.raises(ValueError, match="same at all places"):
                dw.method(slug, overrides={PLACE: {item.name: getattr(plain, item.name)}})
            continue
        tried = []
        for value in others(item, getattr(plain, item.name)):
            try:
                method = dw.method(slug, overrides={PLACE: {item.name: value}})
                different = made(method) != usual
            except ValueError:  # together with the other settings it cannot be
                continue
            tried.append(value)
            if different:
                break
        else:
            ignored += [item.name] if tried else []
    ignored = sorted(set(ignored) - ELSEWHERE.get(slug, set()))
    assert not ignored, f"{slug}: overrides of {', '.join(ignored)} change nothing"
