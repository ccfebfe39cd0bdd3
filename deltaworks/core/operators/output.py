"""A layer's own output, kept for backward in the place of what it was made of.

What reads an output often keeps it as well, so that it costs no memory of its own. It may also be written to: models
add residuals in place. Hence whoever keeps it asks before using it, and makes what it needs again where it is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .products import strips


def gained(
    ctx: Any, y: Tensor, gain: Tensor, bias: Tensor | None, trains: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Turn `y` into `gain y + bias` in place, in a function that returns it.

    Args:
        ctx: the function's; `gain_gradient` wants the same.
        y: `... x out`.
        gain: `out`, in y's dtype.
        bias: `out`, or None.
        trains: whether the gain gets a gradient; if not, nothing is kept.

    Returns:
        a copy of what the gain met (`rows x out`) and y itself, for `save_for_backward`; one of them is None. The copy
        where y does not tell: a bias would have to be taken off again; and a gain of zero hides it, but to ask for one
        holds up a GPU.
    """
    rows = y.view(-1, len(gain))
    if not trains:
        rows.mul_(gain) if bias is None else torch.addcmul(bias.to(y.dtype), rows, gain, out=rows)
        return None, None
    if bias is not None or y.device.type != "cpu":
        before = rows.clone()
        rows.mul_(gain) if bias is None else torch.addcmul(bias.to(y.dtype), before, gain, out=rows)
        return before, None
    rows.mul_(gain)
    ctx.writes = y.detach()
    ctx.writes.data = y.new_empty(0)  # shares y's count of writes, and none of its memory
    ctx.written = ctx.writes._version
    return None, y.data  # with a count of its own, or autograd would refuse to hand it out after a write


def gain_gradient(ctx: Any, g: Tensor, y: Tensor | None, gain: Tensor) -> Tensor | None:
    """The gradient of the gain from what was kept of `gained`'s output.

    Args:
        ctx: as for `gained`.
        g: gradient of y, `... x out`.
        y: the output, or None where it was not kept.
        gain: `out`.

    Returns:
        `out`; None where the output does not tell: not kept, written to since, or under a gain of zero.
    """
    if y is None or ctx.writes._version != ctx.written or bool((gain == 0).any()):
        return None
    g, y = g.reshape(-1, len(gain)), y.reshape(-1, len(gain))
    total = gain.new_zeros(len(gain), dtype=torch.promote_types(g.dtype, torch.float32))
    for some in strips(g):
        total += (g[some] * y[some]).sum(0)
    return total.to(gain.dtype) / gain
