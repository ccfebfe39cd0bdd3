"""Gradients of linear layers' weights from what they read and what comes back: `G = sum_t g_t x_t^T`.

The weight itself takes no part, so it may be quantised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .running import Batch, loss_of, untouched


def product_gradients(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Batch], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The mean over batches of the gradient of each linear layer's weight, `out x in`, on the CPU.

    Layer by layer while the backward pass runs: one full gradient at a time is on the model's device.

    Args:
        model: run in evaluation mode and left as it was.
        paths: linear layers by dotted name.
        batches: with labels.
        dtype: of the sums.

    Raises:
        ValueError: when a batch gives no loss, a layer is not called, or there is no batch.
    """
    totals: dict[str, Tensor] = {}

    def watch(path: str, x: Tensor, y: Tensor) -> None:
        def take(g: Tensor) -> None:
            wide = torch.promote_types(g.dtype, torch.float32)
            product = g.flatten(0, -2).to(wide).T @ x.flatten(0, -2).to(wide)
            value = product.to("cpu", dtype)
            totals[path] = totals[path].add_(value) if path in totals else value.clone()

        y.register_hook(take)

    def hook(path: str) -> Any:
        # Nothing in a quantised base asks for gradients, so the first layer's output has to.
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            watch(path, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach(), y)
            return y

        return after

    count = 0
    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    with untouched(model), torch.enable_grad():
        try:
            for batch in batches:
                loss_of(model, batch).backward()
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    missing = [path for path in paths if path not in totals]
    if missing or not count:
        raise ValueError(
            f"{', '.join(missing) or 'no layer'} got no gradient: no batch was given, or the layer is never called"
        )
    return {path: totals[path].div_(count) for path in paths}
