"""A layer's own output, kept for backward in the place of what it was made of.

What reads an output often keeps it as well, so that it costs no memory of its own. It may also be written to: models
add residuals in place. Hence whoever keeps it asks before using it, and makes what it needs again where it is gone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def serves(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the output of a layer that reads `x` tells what stood before its gain.

    A bias would have to be taken off again, and a gain of zero hides it: to ask for that would hold up a GPU.
    """
    return bias is None and x.device.type == "cpu"


def kept_output(ctx: Any, y: Tensor) -> Tensor:
    """What a function that returns `y` hands to `save_for_backward`; `as_returned` tells whether it still holds."""
    ctx.writes = y.detach()
    ctx.writes.data = y.new_empty(0)  # shares y's count of writes, and none of its memory
    ctx.written = ctx.writes._version
    return y.data  # with a count of its own, or autograd would refuse to hand it out after a write


def as_returned(ctx: Any) -> bool:
    """Whether nothing was written to the output since."""
    return ctx.writes._version == ctx.written


def gain_gradient(g: Tensor, y: Tensor, gain: Tensor) -> Tensor | None:
    """The gradient of a gain, `y = gain * z`, from z's product with it; None where a gain of zero hides z.

    Args:
        g: gradient of y, `tokens x out`.
        y: `tokens x out`.
        gain: `out`.
    """
    if bool((gain == 0).any()):
        return None
    return (g * y).sum(0).to(gain.dtype) / gain
