"""How a mixture of experts spreads its tokens: counts per expert, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.anatomy import Anatomy
from .running import Batch, moved, untouched


@dataclass(frozen=True)
class RouterLoad:
    """What one router did.

    Attributes:
        counts: how often each expert was chosen, `experts`, int64.
        mass: the sum of the router's softmax over all tokens, `experts`, float64: the same without the hard choice.
        tokens: how many tokens were routed, padding left out.
    """

    counts: Tensor
    mass: Tensor
    tokens: int


def router_loads(base: Anatomy, batches: Iterable[Batch]) -> dict[int, RouterLoad]:
    """The load of every router, by block index.

    Args:
        base: the described model; run in evaluation mode and left as it was.
        batches: as the model is called; tokens that an attention mask hides do not count.

    Raises:
        ValueError: when the model has no router, or a router gives nothing that can be read.
    """
    routers = {block.index: block.router for block in base.blocks if block.router is not None}
    if not routers:
        raise ValueError(f"{type(base.model).__name__} has no mixture of experts, so there is nothing to count")
    config = getattr(base.model, "config", None)
    settings = (getattr(config, name, None) for name in ("num_experts_per_tok", "moe_top_k", "top_k"))
    chosen = next((value for value in settings if isinstance(value, int)), None)
    counts: dict[int, Tensor] = {}
    mass: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}
    visible: list[Tensor | None] = [None]

    def take(index: int, path: str, result: Any) -> None:
        logits, indices = _read(result, chosen, path)
        mask = visible[0]
        if mask is not None and mask.numel() == len(logits):
            keep = mask.reshape(-1).to(logits.device)
            logits, indices = logits[keep], indices[keep]
        experts = logits.shape[-1]
        flat = indices.reshape(-1)
        # An index equal to the number of experts stands for "none".
        found = torch.bincount(flat[flat < experts].cpu(), minlength=experts)
        share = torch.softmax(logits.double(), -1).sum(0).cpu()
        counts[index] = counts.get(index, 0) + found
        mass[index] = mass.get(index, 0) + share
        tokens[index] = tokens.get(index, 0) + len(logits)

    handles = []
    try:
        for index, path in routers.items():
            module = base.model.get_submodule(path)
            handles.append(module.register_forward_hook(lambda m, a, y, index=index, path=path: take(index, path, y)))
        with untouched(base.model), torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                visible[0] = mask.bool() if isinstance(mask, Tensor) else None
                base.model(**moved(batch, base.model))
    finally:
        for handle in handles:
            handle.remove()
    silent = [path for index, path in routers.items() if index not in counts]
    if silent:
        raise ValueError(f"{', '.join(silent)} routed no token: no batch was given, or the router is never called")
    return {index: RouterLoad(counts[index], mass[index], tokens[index]) for index in routers}


def _read(result: Any, chosen: int | None, path: str) -> tuple[Tensor, Tensor]:
    """Logits (`tokens x experts`) and chosen experts (`tokens x k`) of a router's output."""
    given = result if isinstance(result, (tuple, list)) else (result,)
    values = [value for value in given if isinstance(value, Tensor)]
    logits = next((value for value in values if value.is_floating_point()), None)
    indices = next((value for value in values if not value.is_floating_point()), None)
    if logits is None or (indices is None and chosen is None):
        raise ValueError(f"the router {path} gives neither logits nor choices that can be counted")
    logits = logits.reshape(-1, logits.shape[-1])
    if indices is None:
        indices = logits.topk(min(chosen or 1, logits.shape[-1]), dim=-1).indices
    return logits, indices.reshape(len(logits), -1)
