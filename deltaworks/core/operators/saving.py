"""What a function keeps of its input for the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def save(ctx: Any, x: Tensor | None, *others: Tensor | None) -> None:
    """`ctx.save_for_backward(x, *others)`, but of an x that is a product the two factors that autograd keeps anyway.

    In a gated block the last layer reads `act(gate) * up`. The product needs both factors for its own gradients, long
    after this function's are computed: kept beside them it is one more tensor as wide as the block.
    """
    ctx.save_for_backward(*_factors(x), *others)


def saved(ctx: Any) -> tuple[Any, ...]:
    """The tensors given to `save`; a product that was left out is multiplied again, to the same bits."""
    x, factor, *others = ctx.saved_tensors
    return x if factor is None else x * factor, *others


def _factors(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(x, None), or the factors of x where autograd keeps them.

    Where hooks store something else in their place, a note for a recomputation or a copy elsewhere, x is kept: only
    tensors that the product itself reads are its factors.
    """
    if x is None or x._version or type(x.grad_fn).__name__ != "MulBackward0":
        return x, None
    node: Any = x.grad_fn
    stored = [getattr(getattr(node, f"_raw_saved_{name}", None), "data", None) for name in ("self", "other")]
    for factor, (source, _) in zip(stored, node.next_functions, strict=True):
        if not isinstance(factor, Tensor) or factor.grad_fn is None or factor.grad_fn is not source:
            return x, None
        if (factor.shape, factor.dtype, factor.device) != (x.shape, x.dtype, x.device):
            return x, None
    return stored[0], stored[1]
