"""What a method costs on a base: its sizes, without loading a weight, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of one forward pass until its backward pass.

    Every storage counts once; those of the model's parameters and buffers, which are there anyway, do not.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(kept.values())
