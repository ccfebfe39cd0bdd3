"""What a method would cost on a base, without loading a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attach import attach, detach
from .method import Method


def size_on(model: nn.Module, method: Method) -> dict[str, Any]:
    """Sizes of a method on a model whose tensors may be on the meta device.

    Returns:
        `trainable` (values that train), `share` (of the base's parameters), `saved_bytes` (of the artifact's tensors);
        or `reason`, in a few words, when the method cannot say or does not fit this base.
    """
    if method.needs_data:
        return {"reason": "depends on the data"}
    try:
        with torch.device("meta"):
            tuned = attach(model, method, name="costs")
    except ValueError as refusal:
        return {"reason": str(refusal)}
    try:
        summary = tuned.summary()
    finally:
        detach(model, "costs")
    return {"trainable": summary.trainable, "share": summary.share, "saved_bytes": summary.stored_bytes}
