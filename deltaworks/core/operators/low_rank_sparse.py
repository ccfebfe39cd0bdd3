"""Low rank and sparse: `dW = scale * B A + S`, S zero but for `k` fixed entries.

The gradient of S is sampled at its entries, so neither it nor the optimizer's state is ever larger than `k`. The
product with S goes through a scratch copy of the weight with S added.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...model.weights import Weight
from .low_rank import (
    Factored,
    add_back,
    add_branch,
    base_product,
    branch_gradients,
    branch_input,
    convolved,
    dropped,
    kept,
    plain,
)
from .products import over_rows
from .saving import save, saved

CHUNK = 1 << 22
"""Values gathered, or of a product, at a time."""
FEWEST = 512
"""Rows of a product at a time: fewer take nearly as long."""
SCARCE = 1000
"""Of as many entries less than one must be wanted for gathering to be cheaper than the product."""


class LowRankSparse(Factored):
    """`dW = scale * B A + sparse_scale * S`.

    Args:
        a: `rank x in`.
        b: `out x rank`.
        values: the entries of S, `k`.
        index: their places `i * in + j` in the `out x in` matrix, all different.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the low-rank branch in training; S sees them all.
        sparse_scale: multiplies S.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "dropout", "sparse_scale")
    index: Tensor

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        values: Tensor,
        index: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        sparse_scale: float = 1.0,
    ) -> None:
        super().__init__()
        size = b.shape[0] * a.shape[1]
        if a.shape[0] != b.shape[1] or values.shape != index.shape or values.dim() != 1:
            shapes = f"A {list(a.shape)}, B {list(b.shape)}, {list(values.shape)} values and {list(index.shape)} places"
            raise ValueError(f"{shapes} do not fit; A is r x in, B out x r, one place for each value")
        if index.numel() and not index.is_meta and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"places of S lie outside its {b.shape[0]} x {a.shape[1]} entries")
        self.a, self.b, self.values = nn.Parameter(a), nn.Parameter(b), nn.Parameter(values)
        self.register_buffer("index", index.to(torch.int32 if size < 2**31 else torch.int64))
        self.scale, self.dropout, self.sparse_scale = float(scale), float(dropout), float(sparse_scale)

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    def sparse(self) -> Tensor:
        """S, `out x in`, with its scale."""
        shape = self.b.shape[0], self.a.shape[1]
        flat = torch.zeros(shape[0] * shape[1], dtype=self.values.dtype, device=self.values.device)
        return self.sparse_scale * flat.index_add(0, self.index.long(), self.values).view(shape)

    def dense(self) -> Tensor:
        return super().dense() + self.sparse()

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return True

    def side(self, x: Tensor) -> Tensor:
        if plain(self, x):
            return self._product(x, None, None)
        return add_branch(self, x, x @ self.sparse().to(x.dtype).T, self.a, self.b)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return y + self.side(x).to(y.dtype)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not plain(self, x) or weight.dtype != x.dtype:
            return None
        return self._product(x, weight, bias)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
        settings = (self.values, self.index, self.sparse_scale, self.b.shape[0])
        return sparse_linear(x, weight, bias, *settings, mask, self)

    def look_up(self, tokens: Tensor, layer: nn.Embedding) -> Tensor:
        if self.additive:
            change = nn.functional.embedding(tokens, self.sparse().T, layer.padding_idx)
            return super().look_up(tokens, layer) + change
        return nn.functional.embedding(tokens, self._moved(layer).T, layer.padding_idx)

    def convolve(self, x: Tensor, layer: Any) -> Tensor:
        # Dropout comes before the product only; a subclass that does not just add makes its rest of the weight itself.
        rest = self.sparse() if self.additive else self._moved(layer) - super().dense()
        y = convolved(rest, x, layer)
        if layer.groups == 1 and layer.padding_mode == "zeros":
            return y + super().convolve(x, layer)
        # What is inherited takes `dense` for other layers, and with it S once more.
        return y + convolved(super().dense(), dropped(self, x), layer)

    def _moved(self, layer: nn.Module) -> Tensor:
        """By what the weight of an embedding or a convolution changes, `out x in`."""
        weight = Weight(layer).matrix()
        weight = weight.to(torch.promote_types(weight.dtype, self.values.dtype))
        return self.fold(weight) - weight


def packed(mask: Tensor) -> Tensor:
    """A mask as bits, eight to a byte, row by row."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, rows: int, columns: int) -> Tensor:
    """The mask, `rows x columns`, that `packed` made bits of."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).flatten()[: rows * columns].view(rows, columns).bool()


def sparse_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    index: Tensor,
    scale: float,
    fan_out: int,
    mask: Tensor | None = None,
    branch: LowRankSparse | None = None,
) -> Tensor:
    """`x (m W + scale S)^T + bias`, and a low-rank branch's term; W and bias frozen, without W without the first term.

    Args:
        x: `... x in`.
        weight: W, `out x in`.
        bias: `out`.
        values: the entries of S.
        index: their places `i * in + j`.
        scale: multiplies S.
        fan_out: out.
        mask: m as bits (`packed`); None for all of W.
        branch: whose factors make the low-rank term, if any.
    """
    survive, a, b, branch_scale = None, None, None, 0.0
    if branch is not None:
        (survive, branch_scale), (a, b) = kept(branch, x), branch.factors()
    return _SparseLinear.apply(x, weight, bias, values, index, scale, fan_out, mask, a, b, branch_scale, survive)  # type: ignore[return-value]


def _scratch(
    x: Tensor,
    weight: Tensor | None,
    values: Tensor,
    index: Tensor,
    scale: float,
    fan_out: int,
    mask: Tensor | None,
) -> Tensor:
    """The weight under its mask with S added, `out x in`, in x's dtype."""
    below = x.new_zeros(fan_out, x.shape[-1]) if weight is None else weight.clone(memory_format=torch.contiguous_format)
    if mask is not None:
        below.masked_fill_(~unpacked(mask, fan_out, x.shape[-1]), 0)
    below.view(-1).index_add_(0, index, values.to(below.dtype), alpha=scale)
    return below


class _SparseLinear(torch.autograd.Function):
    """`sparse_linear`; keeps x, `x A^T`, and nothing as large as the weight but the weight itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        values: Tensor,
        index: Tensor,
        scale: float,
        fan_out: int,
        mask: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        branch_scale: float,
        survive: Tensor | None,
    ) -> Tensor:
        ctx.sparse_scale, ctx.fan_out, ctx.fan_in = scale, fan_out, x.shape[-1]
        ctx.scale, ctx.thin = branch_scale, x.dtype
        ctx.needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[8:10]
        need_x, need_a, need_b = ctx.needed
        y, rows = base_product(x, _scratch(x, weight, values, index, scale, fan_out, mask), bias)
        z = None
        if a is not None and b is not None:
            z = branch_input(x, survive) @ a.to(x.dtype).T
            rows.addmm_(z, b.to(x.dtype).T, alpha=branch_scale)
        needed = x if ctx.needs_input_grad[3] or need_a else None
        survive = survive if need_a or need_x else None
        save(ctx, needed, survive, z if need_b else None, weight, values, index, mask, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, survive, z, weight, values, index, mask, a, b = saved(ctx)
        g = gradients[0].reshape(-1, ctx.fan_out)
        dx = dv = gb = da = db = None
        if a is not None:
            gb, da, db = branch_gradients(ctx, g, x, survive, z, a, b)
        if ctx.needs_input_grad[0]:
            like = g.new_empty(0, ctx.fan_in)
            dx = g @ _scratch(like, weight, values, index, ctx.sparse_scale, ctx.fan_out, mask)
            if gb is not None and a is not None:
                add_back(dx, gb, a, ctx.scale, survive)
            dx = dx.view(*gradients[0].shape[:-1], ctx.fan_in)
        if ctx.needs_input_grad[3]:
            dv = sampled(g, x.reshape(-1, x.shape[-1]), index).mul_(ctx.sparse_scale).to(values.dtype)
        return dx, None, None, dv, None, None, None, None, da, db, None, None


def sampled(g: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Entries of `g^T x` (`out x in`) at flat places: of some of its rows at a time, or by gathered columns.

    Args:
        g: `tokens x out`.
        x: `tokens x in`.
        index: places `i * in + j`.
    """
    fan_out, fan_in = g.shape[1], x.shape[1]
    if len(index) * SCARCE >= fan_out * fan_in:
        # A product computes an entry hundreds of times faster than a gather does.
        most = max(fan_out // 4, min(fan_out // 2, FEWEST))
        found = g.new_empty(len(index))
        for low in range(0, fan_out, step := max(1, min(CHUNK // fan_in, most))):
            product = over_rows(g[:, low : low + step], x).flatten()
            places = index - low * fan_in
            inside = (places >= 0) & (places < len(product))
            found[inside] = product[places[inside]]
        return found
    rows, columns = index.long() // fan_in, index.long() % fan_in
    outs, ins = g.T.contiguous(), x.T.contiguous()
    step = max(1, CHUNK // max(1, len(x)))
    parts = [torch.linalg.vecdot(outs[r], ins[c]) for r, c in zip(rows.split(step), columns.split(step), strict=True)]
    return torch.cat(parts) if parts else outs.new_empty(0)


def outliers(w: Tensor, number: int) -> Tensor:
    """Places of the largest entries that two rounds of a rank-one decomposition leave of W, ascending."""
    if w.is_meta:
        return torch.arange(number)
    v, s = torch.randn(1, w.shape[1]).to(w), torch.zeros_like(w)
    rest = w
    for _ in range(2):
        u = torch.linalg.qr((w - s) @ v.T).Q
        v = u.T @ (w - s)
        rest = w - u @ v
        s = torch.where(rest.abs() < 0.01, 0, rest)
    return rest.abs().flatten().topk(number).indices.sort().values.cpu()
