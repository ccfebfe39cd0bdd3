"""Deltaworks' own format: `adapter.json` says what the adapter is, `adapter.safetensors` holds its values.

    {"format": 1, "library": "0.1.0", "method": "lora", "settings": {...}, "seed": 0,
     "base": {"class": ..., "name": ..., "fingerprint": ..., "hidden_size": ...},
     "shared": {"bank": {"kind": ..., "settings": {...}, "tensors": {"a": "F32 8x32"}}},
     "parts": [{"path": ..., "parameter": ..., "part": ..., "label": ..., "kind": "LowRank", "settings": {...},
                "tensors": {"a": "F32 8x32", "b": "F32 48x8"}}]}

A tensor is called `<path>:<label>.<tensor>`, `@<shared>.<tensor>`, or as the parameter of the base that it replaces.
Loading makes the parts again from what stands there; the method's own initialisation does not run, but where a part has
a "start", the hash of tensors that were left out (`starts`).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..core.attach import named_parts, state_of
from ..core.part import Part, Trained, in_place
from ..model.anatomy import Anatomy, describe
from .fingerprint import fingerprint, trained_parameter
from .sites import find_site
from .weights import NAMES

FORMAT = 1
Values = dict[str, Tensor]


def describe_adapter(model: nn.Module, name: str, library: str) -> tuple[dict[str, Any], Values]:
    """An adapter as the two files hold it: the JSON object, and the tensors by name.

    Raises:
        ValueError: when a hyper-parameter or a place cannot be written down.
    """
    adapter = state_of(model).adapters[name]
    base = describe(model)
    values: Values = {}
    parts = []
    brought = [part.site for _, part in named_parts(model, name) if in_place(part, part.site)]
    lent: set[str] = set()
    for (path, label), (_, part) in zip(adapter.places, named_parts(model, name), strict=True):
        own = {"": learned(model, part)} if isinstance(part, Trained) else part.tensors()
        parts.append(_written(base, part, label, own))
        lent |= set(part.borrowed)
        for inner, value in own.items():
            _put(values, tensor_name(path, label, part.site.parameter, inner), value)
    # What only training needed, nobody borrows any more.
    shared = {key: module for key, module in adapter.shared.items() if key in lent}
    for key, module in shared.items():
        for inner, value in module.state_dict().items():
            _put(values, f"@{key}.{inner}", value)
    config = {
        "format": FORMAT,
        "library": library,
        "method": adapter.method.slug,
        "settings": {
            key: _plain(f"{adapter.method.slug}: {key}", value) for key, value in adapter.method.settings().items()
        },
        "seed": adapter.seed,
        "base": {
            "class": type(model).__name__,
            "name": base_name(model),
            "fingerprint": fingerprint(model, brought),
            "hidden_size": base.hidden_size,
        },
        "shared": {
            key: {
                "kind": type(module).__name__,
                "settings": {k: _plain(f"{key}.{k}", v) for k, v in module.configuration().items()},
                "tensors": {inner: signature(value) for inner, value in module.state_dict().items()},
            }
            for key, module in shared.items()
        },
        "parts": parts,
    }
    return config, values


def base_name(model: nn.Module) -> str | None:
    """The name or path the base was loaded from, as its configuration remembers it."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name or None


def signature(value: Tensor) -> str:
    """Dtype and shape as text: "F32 8x32"."""
    return f"{NAMES.get(value.dtype, value.dtype)} {'x'.join(map(str, value.shape)) or 'scalar'}"


def _written(base: Anatomy, part: Part, label: str, own: Values) -> dict[str, Any]:
    site = part.site
    known = find_site(base, site.path, site.parameter, site.part)
    written = {
        "path": site.path,
        "parameter": site.parameter,
        "part": site.part,
        "label": label,
        "kind": type(part).__name__,
        "settings": {key: _plain(f"{site.name}: {key}", value) for key, value in part.configuration().items()},
        "tensors": {inner: signature(value) for inner, value in own.items()},
    }
    if site.rows != known.rows:
        written["rows"] = None if site.rows is None else list(site.rows)
    return written


def learned(model: nn.Module, part: Trained) -> Tensor:
    """The value an adapter gives a parameter of the base, wherever it is kept at present."""
    return part.learned if part.learned is not None else trained_parameter(model, part).detach()


def tensor_name(path: str, label: str, parameter: str | None, inner: str) -> str:
    """What a tensor is called in the file; `inner` is empty for a parameter of the base itself."""
    if not inner:
        return f"{path}.{parameter}" if path else str(parameter)
    return f"{path}:{label}.{inner}"


def _put(values: Values, name: str, value: Tensor) -> None:
    if name in values:
        raise ValueError(f"two tensors of the adapter would be called {name!r} in the file")
    values[name] = value


def _plain(what: str, value: Any) -> Any:
    """A hyper-parameter as JSON holds it; a module type (in `on`) by its full name."""
    if isinstance(value, type):
        return {"type": f"{value.__module__}.{value.__qualname__}"}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{what} is {value}, which a file cannot hold")
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(what, item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(what, item) for key, item in value.items()}
    raise ValueError(f"{what} is {value!r}, which a file cannot hold; take plain values, roles and names")
