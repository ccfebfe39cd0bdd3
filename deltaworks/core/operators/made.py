"""Low-rank factors that are made of smaller things, and the products with them.

What a factor is made of is small or frozen; the factor itself may be as wide as the layer and have a large rank. So
autograd is given what it is made of, and backward makes it again: nothing of it is kept between the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from .effective import Built
from .low_rank import Factored, add_back, base_product, branch_input, kept, narrow_gradient, plain
from .products import in_rows, over_rows
from .saving import save, saved


class Made(Factored, Built):
    """`dW = scale * B A` with factors that are functions of other tensors.

    Attributes:
        train_a, train_b: whether anything that A or B is made of receives gradients.
    """

    train_b: bool = True

    def sources(self) -> list[Tensor]:
        """The tensors that train, of which the factors are made."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def made(self, dtype: torch.dtype, *sources: Tensor) -> tuple[Tensor, Tensor]:
        """A (`rank x in`) and B (`out x rank`) in a dtype, differentiable in the sources."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        sources = self.sources()
        return self.made(sources[0].dtype, *sources)

    def built(self, weight: Tensor) -> Tensor:
        a, b = self.made(weight.dtype, *(source.detach() for source in self.sources()))
        return torch.addmm(weight, in_rows(b), a, alpha=self.scale)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            sources = [source.detach().requires_grad_() for source in self.sources()]
            a, b = self.made(change.dtype, *sources)
        da = over_rows(b.detach(), change).mul_(self.scale) if self.train_a else None
        db = (change @ a.detach().T).mul_(self.scale) if self.train_b else None
        return _through((a, b), (da, db), sources)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return made_linear(self, x, weight, bias)


def made_linear(part: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`x W^T + bias + scale (x A^T) B^T` with W and bias frozen; None where autograd must see the pieces.

    Args:
        part: has `sources`, `made`, `train_a`, `train_b`, `scale` and `dropout`, as `Made` does.
        x: `... x in`.
        weight: W, `out x in`.
        bias: `out`, or None.
    """
    if not plain(part, x) or weight.dtype != x.dtype:
        return None
    survive, scale = kept(part, x)
    return _MadeLinear.apply(x, weight, bias, part, scale, survive, *part.sources())  # type: ignore[return-value]


class _MadeLinear(torch.autograd.Function):
    """`x W^T + bias + scale ((kept x) A^T) B^T` with W and bias frozen; keeps x if A trains, `x A^T` if B does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Any,
        scale: float,
        survive: Tensor | None,
        *sources: Tensor,
    ) -> Tensor:
        a, b = part.made(x.dtype, *(source.detach() for source in sources))
        z = branch_input(x, survive) @ a.T
        y, rows = base_product(x, weight, bias)
        rows.addmm_(z, b.T, alpha=scale)
        ctx.part, ctx.scale = part, scale
        need = any(ctx.needs_input_grad[6:])
        save(
            ctx,
            x if need and part.train_a else None,
            survive if (need and part.train_a) or ctx.needs_input_grad[0] else None,
            z if need and part.train_b else None,
            weight,
            *sources,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, z, weight, *kept_sources = saved(ctx)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        wanted = ctx.needs_input_grad[6:]
        with torch.enable_grad():
            sources = [t.detach().requires_grad_(need) for t, need in zip(kept_sources, wanted, strict=True)]
            a, b = ctx.part.made(g.dtype, *sources)
        gb = g @ b.detach()
        da = None if x is None else narrow_gradient(gb, branch_input(x, survive), ctx.scale, g.dtype)
        db = None if z is None else narrow_gradient(z, g, ctx.scale, g.dtype).T
        dx = None
        if ctx.needs_input_grad[0]:
            dx = add_back(g @ weight, gb, a.detach(), ctx.scale, survive)
            dx = dx.view(*gradients[0].shape[:-1], weight.shape[-1])
        given = iter(_through((a, b), (da, db), [source for source in sources if source.requires_grad]))
        return dx, None, None, None, None, None, *(next(given) if need else None for need in wanted)


def _through(
    factors: tuple[Tensor, Tensor], gradients: tuple[Tensor | None, Tensor | None], sources: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of the sources from those of the factors; None for a factor that does not train."""
    pairs = [(factor, gradient) for factor, gradient in zip(factors, gradients, strict=True) if gradient is not None]
    if not pairs or not sources:
        return (None,) * len(sources)
    made, given = zip(*pairs, strict=True)
    return torch.autograd.grad(made, sources, given, allow_unused=True)


_CONSTANTS = WeakTensorKeyDictionary()


def constant(source: Tensor, dtype: torch.dtype, view: Callable[[Tensor], Tensor], key: Hashable) -> Tensor:
    """`view(source)` in a dtype and in one piece, for a frozen source; made once, and again when the source changes.

    A source that trains, or is no ordinary tensor, is viewed anew in every call.

    What layers share is cast once for all of them instead of once a layer and pass.

    Args:
        source: a tensor that does not train.
        dtype: of the result.
        view: what is taken of it.
        key: names the view, equal for equal views.
    """
    if torch.compiler.is_compiling() or source.is_meta or type(source) not in (Tensor, nn.Parameter):
        return view(source).to(dtype)
    if source.is_inference() or source.requires_grad:
        return view(source).to(dtype)
    if source not in _CONSTANTS:
        _CONSTANTS[source] = {}
    state = source._version, source.data_ptr()  # a parameter moved to another place or dtype keeps its identity
    known: dict[Any, tuple[tuple[int, int], Tensor]] = _CONSTANTS[source]  # type: ignore[assignment]
    found = known.get((dtype, key))
    if found is None or found[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            found = known[dtype, key] = state, view(source).to(dtype).contiguous()
    return found[1]
