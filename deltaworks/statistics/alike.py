"""Which layers read the same activations, so that what is measured for one holds for the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .running import Batch, moved, untouched


def same_inputs(model: nn.Module, paths: Sequence[str], batch: Batch) -> dict[str, str]:
    """For each module, by dotted name, the first of `paths` that reads the very same values on one batch.

    Queries, keys and values read one tensor, and so do the gate and the up-projection of a feed-forward part. Values
    are compared by a digest; none is kept.
    """
    seen: dict[bytes, str] = {}
    found: dict[str, str] = {}

    def look(path: str, values: tuple[Any, ...]) -> None:
        x = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
        if x is not None and path not in found:
            raw = x.detach().contiguous().cpu().view(torch.uint8).numpy()
            digest = hashlib.blake2b(raw.tobytes(), digest_size=16).digest() + str(tuple(x.shape)).encode()
            found[path] = seen.setdefault(digest, path)

    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, a, k, path=path: look(path, (*a, *k.values())), with_kwargs=True
        )
        for path in paths
    ]
    try:
        with untouched(model), torch.no_grad():
            model(**moved(batch, model))
    finally:
        for handle in handles:
            handle.remove()
    return {path: found.get(path, path) for path in paths}
