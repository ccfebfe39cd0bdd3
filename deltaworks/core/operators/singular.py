"""Changes within the weight's own singular vectors, `W = U S V^T`, which are found again from the weight, never stored.

A file holds a print of every vector, its product with a fixed random one. Loading compares: of vectors whose singular
values are nearly equal another machine may find others, and a change within others is another change.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta
from .effective import Built
from .made import Made, constant
from .recompute import recomputed
from .scaled import Scaled


class Singular(Delta):
    """Base of the deltas that live in the first `rank` singular vectors; before `settle` it has none and adds nothing.

    Args:
        prints: `rank`, zero for a basis that is new.
        fan_out, fan_in: size of the weight.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in")
    prints: Tensor
    u: Tensor | None
    s: Tensor | None
    vh: Tensor | None

    def __init__(self, prints: Tensor, fan_out: int, fan_in: int) -> None:
        super().__init__()
        if prints.dim() != 1 or len(prints) > min(fan_out, fan_in):
            raise ValueError(
                f"a weight of {fan_out} x {fan_in} has {min(fan_out, fan_in)} singular values, not {list(prints.shape)}"
            )
        self.fan_out, self.fan_in = fan_out, fan_in
        self.register_buffer("prints", prints)
        for name in ("u", "s", "vh"):
            self.register_buffer(name, None, persistent=False)

    def settle(self, weight: Weight) -> None:
        """Find U (`out x rank`), S (`rank`) and V^T (`rank x in`).

        Raises:
            ValueError: when they are not those that the delta was trained with.
        """
        if self.u is None:
            self._find(weight.dense(), weight.path or "a weight")
        if self.u is not None and self.vh is not None:
            # What they give is added to the weight, so they need no more than its precision; two lie about a layer.
            dtype = weight.dtype
            self.u, self.vh = self.u.to(dtype).contiguous(), self.vh.mT.to(dtype).contiguous().mT

    def _find(self, dense: Tensor, where: str) -> None:
        if dense.is_meta:
            return
        rank = self.prints.shape[-1]
        u, s, vh = (part[..., :rank, :] if i == 2 else part[..., :rank] for i, part in enumerate(self.found(dense)))
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(self.fan_in, generator=generator, dtype=torch.float64, device="cpu")
        prints = (vh @ probe.to(vh)).to(self.prints.dtype)
        if not self.prints.any():
            self.prints.copy_(prints)
        elif not torch.allclose(prints, self.prints.to(prints.device), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"the singular vectors of {where} are not those the adapter was trained in; "
                "the base must be the very same, or merge where it was trained"
            )
        self.u, self.s, self.vh = u, s, vh

    def found(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V^T of a weight; or what a subclass takes for them, the last of orthonormal rows."""
        return decomposed(weight)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """V^T (`rank x in`) and U (`out x rank`)."""
        if self.u is None or self.vh is None:
            raise RuntimeError("the vectors are not there yet; they are made when an adapter is attached")
        return self.vh, self.u


def decomposed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T (thin), the largest entry of every column of U positive."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, s, vh * signs.T


class SpectrumShift(Singular, Scaled, Built):
    """`dW = U_r diag(shift) V_r^T`.

    Args:
        shift: `rank`, what is added to the singular values.
        prints, fan_out, fan_in: see `Singular`.
    """

    costly = any_order = True
    scale = 1.0

    def __init__(self, shift: Tensor, prints: Tensor, fan_out: int, fan_in: int) -> None:
        super().__init__(prints, fan_out, fan_in)
        if shift.shape != prints.shape:
            raise ValueError(f"{list(shift.shape)} shifts do not fit {list(prints.shape)} singular values")
        self.shift = nn.Parameter(shift)

    def dense(self) -> Tensor:
        return self.shift.new_zeros(self.fan_out, self.fan_in) if self.u is None else super().dense()

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        rank, ends, area = self.shift.shape[-1], self.fan_in + self.fan_out, self.fan_in * self.fan_out
        if not torch.is_grad_enabled():
            return tokens * ends < area
        # Two thin products a pass; or the weight built in both passes, its gradient, and that in the vectors' basis.
        return 2 * tokens * rank * ends < 3 * rank * area + tokens * area

    def built(self, weight: Tensor) -> Tensor:
        if self.u is None:
            return weight.clone()
        vh, u = self.bases(weight.dtype)
        return torch.addmm(weight, u * self.shift.detach().to(u.dtype), vh)

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        if self.u is None:
            return (torch.zeros_like(self.shift),)
        vh, u = self.bases(change.dtype)
        # The one of two equal sums whose first factor lies row by row, as `vh.T` and `u` do.
        product = (change @ vh.T).mul_(u) if change.is_contiguous() else (change.T @ u).mul_(vh.T)
        return (product.sum(0, dtype=self.shift.dtype),)

    def bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        vh, u = self.vectors()
        return vh.to(dtype), u.to(dtype)

    def scales(self) -> tuple[Tensor, None]:
        return self.shift, None


class SparseMiddle(Singular, Made):
    """`dW = g U M V^T`, M zero but for some entries, g the sigmoid of a trained gate or one.

    Beside the weight M acts on the tokens, between two thin products; `U M` is made for the changed weight only.

    Args:
        m: the entries, `k`.
        index: their places `i * n + j` in M (`n x n`), all different.
        prints, fan_out, fan_in: see `Singular`; n prints.
        gate: a scalar, None for g = 1.
    """

    costly = True
    index: Tensor
    scale = 1.0
    train_a = False
    act, with_base = Delta.act, Delta.with_base  # by way of `side`, which needs no factor

    def __init__(
        self, m: Tensor, index: Tensor, prints: Tensor, fan_out: int, fan_in: int, gate: Tensor | None = None
    ) -> None:
        super().__init__(prints, fan_out, fan_in)
        size = len(prints) ** 2
        if m.shape != index.shape or (not index.is_meta and not 0 <= int(index.min()) <= int(index.max()) < size):
            raise ValueError(f"{list(m.shape)} entries need as many places, all below {size}")
        self.m = nn.Parameter(m)
        self.gate = None if gate is None else nn.Parameter(gate)
        self.register_buffer("index", index.to(torch.int32 if size < 2**31 else torch.int64))

    @property
    def rank(self) -> int:
        return self.prints.shape[-1]

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        rank, ends, area = self.rank, self.fan_in + self.fan_out, self.fan_in * self.fan_out
        built = rank * (area + rank * self.fan_out)  # U M, then its product with V^T
        if not torch.is_grad_enabled():
            return tokens * rank * (ends + rank) < built
        # Two thin products and M's a pass, and M's gradient; or the weight built in both, its gradient and M's.
        return tokens * rank * (2 * ends + 3 * rank) < 3 * built + tokens * area

    def side(self, x: Tensor) -> Tensor:
        vh, u = (vectors.to(x.dtype) for vectors in self.vectors())
        z = recomputed(self._turned, x.reshape(-1, self.fan_in) @ vh.T, *self.sources())
        return (z @ u.T).view(*x.shape[:-1], self.fan_out)

    def _turned(self, z: Tensor, *sources: Tensor) -> Tensor:
        """`z (g M)^T` for z of shape `tokens x n`; entry by entry where those are fewer products than M has places."""
        n = self.rank
        if len(z) * self.m.shape[-1] > n * n:
            return z @ self.middle(*sources).to(z.dtype).T
        i, j = constant(self.index, torch.int64, lambda index: torch.stack([index // n, index % n]), n)
        terms = z.gather(1, j.expand(len(z), -1)) * self.entries(*sources)
        return terms.new_zeros(len(z), n).scatter_add(1, i.expand(len(z), -1), terms).to(z.dtype)

    def entries(self, *sources: Tensor) -> Tensor:
        """g m, `k`, of the entries and the gate; of the part's own when none are given."""
        m, *gate = sources or self.sources()
        return m * torch.sigmoid(gate[0]) if gate else m

    def middle(self, *sources: Tensor) -> Tensor:
        """g M, `n x n`, of the same."""
        m, n = self.entries(*sources), self.rank
        return torch.zeros(n * n, dtype=m.dtype, device=m.device).index_add(0, self.index.long(), m).view(n, n)

    def dense(self) -> Tensor:
        return self.m.new_zeros(self.fan_out, self.fan_in) if self.u is None else super().dense()

    def sources(self) -> list[Tensor]:
        return [self.m] if self.gate is None else [self.m, self.gate]

    def made(self, dtype: torch.dtype, *sources: Tensor) -> tuple[Tensor, Tensor]:
        vh, u = self.vectors()
        return vh.to(dtype), u.to(dtype) @ self.middle(*sources).to(dtype)
