"""The bottleneck adapter, `A(r) = U f(D r + b_D) + b_U`, and the places it can take in a block.

The hand-written backward keeps what the bottleneck reads and its pre-activation (`m` values a token); neither `f(.)`
nor anything as wide as the model besides. Pages differ in where it reads, what it is added to, `f`, the scale and the
start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...model.weights import is_ordinary
from ..init import kaiming, normal, zeros
from ..part import Module, Part, Shared, Wrapper

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z * 1,
}
STARTS = ("lora", "bert", "houlsby")


class Bottleneck(Part):
    """The tensors of `s (U f(D r + b_D) + b_U)`.

    Args:
        width: d, of what it reads and gives.
        size: m, of the bottleneck.
        activation: f, a key of `ACTIVATIONS`.
        scale: s.
        learn_scale: whether s is trained.
        start: "lora" (D Kaiming-uniform, U zero: no change), "bert" (both N(0, 0.02)), "houlsby" (both truncated normal
            of deviation `spread`, cut at twice that); biases are zero.
        spread: see `start`.
    """

    settings: ClassVar[tuple[str, ...]] = ("width", "size", "activation", "scale", "learn_scale")

    def __init__(
        self,
        width: int,
        size: int,
        activation: str = "relu",
        scale: float = 1.0,
        learn_scale: bool = False,
        start: str = "lora",
        spread: float = 0.01,
    ) -> None:
        super().__init__()
        self.width, self.size, self.activation = width, size, activation
        self.scale, self.learn_scale = scale, learn_scale
        self.f = ACTIVATIONS[activation]
        if start == "lora":
            down, up = kaiming(size, width), zeros(width, size)
        elif start == "bert":
            down, up = normal(size, width, std=0.02), normal(width, size, std=0.02)
        else:
            down, up = zeros(size, width), zeros(width, size)
            for factor in (down, up):
                nn.init.trunc_normal_(factor, std=spread, a=-2 * spread, b=2 * spread)
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(zeros(size))
        self.up, self.up_bias = nn.Parameter(up), nn.Parameter(zeros(width))
        self.s = nn.Parameter(torch.full((), float(scale))) if learn_scale else None

    def added(self, y: Tensor, r: Tensor) -> Tensor:
        """`y + s A(r)`, both `... x width`."""
        own = (self.down, self.down_bias, self.up, self.up_bias)
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(r.device.type) or not is_ordinary(r):
            down, down_bias, up, up_bias = (tensor.to(r.dtype) for tensor in own)
            change = F.linear(self.f(F.linear(r, down, down_bias)), up, up_bias)
            return y + (change * (self.scale if self.s is None else self.s.to(r.dtype))).to(y.dtype)
        return _Added.apply(y, r, *own, self.s, self.scale, self.f)  # type: ignore[return-value]


class SeriesBottleneck(Bottleneck, Module):
    """After a module: `y + s A(y)`."""

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.added(y, y)


class ParallelBottleneck(Bottleneck, Module):
    """Beside a module: `y + s A(x)`, x what the module reads."""

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.added(y, x)


class NormBottleneck(Bottleneck, Wrapper):
    """Before a norm, reading the normalised value: `norm(z + s A(norm(z)))`."""

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        z, rest = args[0], args[1:]
        return call(self.added(z, call(z, *rest, **kwargs)), *rest, **kwargs)


class Tape(Shared):
    """What taps have heard in the running forward pass, until the other end of the sub-layer takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": {}}


class Tap(Module):
    """Hears what enters a sub-layer that spans several modules."""

    settings = ("place",)
    borrowed = ("tape",)

    def __init__(self, place: int, tape: Tape) -> None:
        super().__init__()
        self.place, self.tape = place, tape

    def input(self, x: Tensor) -> Tensor:
        self.tape.held[self.place] = x
        return x


class Tapped(Module):
    """Beside a sub-layer that spans several modules: at the last of them, reading what the tap of `place` heard.

    Comes first among the bases of a part that defines `added(y, x)`.
    """

    borrowed = ("tape",)

    def __init__(self, *args: Any, place: int, tape: Tape, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.place, self.tape = place, tape

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.added(y, self.tape.held.pop(self.place))  # type: ignore[operator]


class TappedBottleneck(Tapped, Bottleneck):
    """The bottleneck beside such a sub-layer."""

    settings = (*Bottleneck.settings, "place")


class _Added(torch.autograd.Function):
    """`y + s (U f(D r + b_D) + b_U)`; keeps r and the pre-activation."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        r: Tensor,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        learned: Tensor | None,
        scale: float,
        f: Callable[[Tensor], Tensor],
    ) -> Tensor:
        flat = r.reshape(-1, r.shape[-1])
        z = torch.addmm(down_bias.to(r.dtype), flat, down.to(r.dtype).T)
        factor = scale if learned is None else float(learned)
        out = torch.add(y, up_bias.to(y.dtype), alpha=factor)
        out.view(-1, out.shape[-1]).addmm_(f(z).to(y.dtype), up.to(y.dtype).T, alpha=factor)
        ctx.factor, ctx.f = factor, f
        ctx.save_for_backward(r, z, down, up, up_bias, learned)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        r, z, down, up, up_bias, learned = ctx.saved_tensors
        need_y, need_r, need_down, need_down_bias, need_up, need_up_bias = ctx.needs_input_grad[:6]
        g = gradients[0].reshape(-1, gradients[0].shape[-1]).to(r.dtype)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            h = ctx.f(z)
        gh = g @ up.to(r.dtype)
        total = g.sum(0) if need_up_bias or learned is not None else None
        d_learned = None
        if learned is not None and total is not None:
            d_learned = ((gh * h.detach()).sum() + (total * up_bias.to(r.dtype)).sum()).to(learned.dtype)
        (dz,) = torch.autograd.grad(h, z, gh.mul_(ctx.factor))
        d_down = (dz.T @ r.reshape(-1, r.shape[-1])).to(down.dtype) if need_down else None
        d_down_bias = dz.sum(0).to(down.dtype) if need_down_bias else None
        d_up = (g.T @ h.detach()).mul_(ctx.factor).to(up.dtype) if need_up else None
        d_up_bias = (total * ctx.factor).to(up_bias.dtype) if need_up_bias and total is not None else None
        dr = (dz @ down.to(r.dtype)).view(r.shape) if need_r else None
        return gradients[0] if need_y else None, dr, d_down, d_down_bias, d_up, d_up_bias, d_learned, None, None
