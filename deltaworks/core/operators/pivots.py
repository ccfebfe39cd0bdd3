"""The pivots of the weight's own LU decomposition, trained between its triangular factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from .scaled import Scaled

DRIFT = 0.02
"""Share of themselves by which trained pivots may differ in another copy of the base; the change differs by more.

Rounding random weights of 768 x 768 to bfloat16 moves their first 64 pivots by 0.0015 and the change by 0.005; all of
their pivots by 0.006 and the change by 0.012.
"""


class Pivots(Scaled):
    """`dW = P L_r diag(sigma z - scale z0) U_r`, with `W = P L diag(D) U`; z0 is D_r, the first pivots, or any other.

    The factors are made from the base's weight when the delta comes to its place, in float64 on the CPU, so that every
    machine finds the same, and never stored; before that it adds nothing. z0 and D_r are stored, so that a base in
    another precision, whose pivots are a little off, gets what was trained and no more; so are the rows that the pivots
    lie in, since of two nearly equal entries rounding may make the other one the larger.

    Args:
        z: `rank`, trained.
        start: z0, `rank`.
        rows: `rank`, the rows of W in LU's order; all -1 for a delta that is new, which finds z, z0, D and rows itself.
        fan_out, fan_in: size of the weight.
        scale: multiplies the product.
        sigma: `1`, trained and `scale` at the start; none for a constant one.
        pivots: D_r, `rank`; none where it is z0.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in", "scale")
    start: Tensor
    rows: Tensor
    pivots: Tensor | None
    lower: Tensor | None
    upper: Tensor | None

    def __init__(
        self,
        z: Tensor,
        start: Tensor,
        rows: Tensor,
        fan_out: int,
        fan_in: int,
        scale: float = 1.0,
        sigma: Tensor | None = None,
        pivots: Tensor | None = None,
    ) -> None:
        super().__init__()
        if z.dim() != 1 or len(z) > min(fan_out, fan_in):
            raise ValueError(f"a weight of {fan_out} x {fan_in} has {min(fan_out, fan_in)} pivots, not {list(z.shape)}")
        fits = start.shape == z.shape == rows.shape and (pivots is None or pivots.shape == z.shape)
        if fits and not rows.is_meta and bool((rows >= 0).any()):  # else they are not found yet
            fits = int(rows.min()) >= 0 and int(rows.max()) < fan_out and len(rows.unique()) == len(rows)
        if not fits:
            raise ValueError(f"{len(z)} pivots need as many starts and rows, all different and below {fan_out}")
        if sigma is not None and sigma.shape != (1,):
            raise ValueError(f"sigma is one value, not {list(sigma.shape)}")
        self.z = nn.Parameter(z)
        self.sigma = None if sigma is None else nn.Parameter(sigma)
        self.fan_out, self.fan_in, self.scale = fan_out, fan_in, float(scale)
        self.register_buffer("start", start)
        self.register_buffer("rows", rows.to(torch.int32))
        self.register_buffer("pivots", pivots)
        for name in ("lower", "upper"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def settle(self, weight: Weight, begin: Callable[[Tensor], Tensor] | None = None) -> None:
        """Find the factors.

        Args:
            weight: the base's.
            begin: what a new z starts from, given D_r; none for D_r itself. Vanishing pivots stay zero.

        Raises:
            ValueError: when the pivots are not those that the delta was trained from.
        """
        if self.lower is not None or weight.device.type == "meta":
            return
        dense, new = weight.dense(), bool((self.rows < 0).all())
        lower, pivots, upper, rows = decomposed(dense, len(self.z), None if new else self.rows)
        if new:
            begun = pivots if begin is None else torch.where(pivots == 0, 0.0, begin(pivots))
            for own, found in ((self.z, begun), (self.start, begun), (self.pivots, pivots), (self.rows, rows)):
                if own is not None:
                    own.copy_(found)
        known = (self.start if self.pivots is None else self.pivots).to(pivots)
        live = known != 0
        trained, moved = self.scales()[0].to(pivots)[live], (pivots / known)[live] - 1
        if (trained * moved).norm() > DRIFT * trained.norm():
            raise ValueError(
                f"the pivots of {weight.path or 'a weight'} are not those the adapter was trained from; "
                "the base must be the very same, or merge where it was trained"
            )
        upper[~live] = 0.0
        self.lower, self.upper = lower.to(dense), upper.to(dense)

    def dense(self) -> Tensor:
        return self.z.new_zeros(self.fan_out, self.fan_in) if self.lower is None else super().dense()

    def bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.upper is None or self.lower is None:
            raise RuntimeError(
                "the factors are not there yet; they are made from the weight when an adapter is attached"
            )
        return self.upper.to(dtype), self.lower.to(dtype)

    def scales(self) -> tuple[Tensor, None]:
        # Of sigma only its ratio to the scale acts: 1 at the start, so that what is subtracted is the same number. Both
        # are tensors, as GPUs multiply with the reciprocal of a number.
        ratio = 1.0 if self.sigma is None else self.sigma / torch.full_like(self.sigma, self.scale)
        return self.z * ratio - self.start, None


def decomposed(weight: Tensor, rank: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first parts of `W = P L diag(D) U`, and where they were found.

    A pivot below 1e-6 would blow its row of U up; it counts as zero, with a row of zeros, and can never train.

    Args:
        weight: `out x in`.
        rank: number of parts.
        rows: `rank` rows of W to take the pivots from, in this order; none for those of the largest entries.

    Returns:
        `P L_r` (`out x rank`), `D_r`, `U_r` (`rank x in`) of unit diagonal, and the rows, all on the CPU.
    """
    dense = weight.detach().to("cpu", torch.float64)
    packed, swaps, _ = torch.linalg.lu_factor_ex(dense)
    order = torch.arange(len(dense))
    for row, other in enumerate((swaps - 1).tolist()):
        order[[row, other]] = order[[other, row]]
    if rows is not None and rows.tolist() != order[:rank].tolist():
        rows = rows.to(order)
        order = torch.cat([rows, order[~torch.isin(order, rows)]])
        packed = _eliminated(dense[order], rank)
    lower = torch.empty(len(order), rank, dtype=torch.float64)
    lower[order] = packed[:, :rank].tril(-1) + torch.eye(len(order), rank, dtype=torch.float64)
    pivots = packed.diagonal()[:rank].clone()
    small = pivots.abs() < 1e-6
    upper = packed[:rank].triu() / torch.where(small, 1.0, pivots).unsqueeze(1)
    pivots[small], upper[small] = 0.0, 0.0
    return lower, pivots, upper, order[:rank]


def _eliminated(packed: Tensor, rank: int) -> Tensor:
    """A matrix turned in place into L and U as LU packs them, rows as they are, as far as `rank` pivots go."""
    panel, ahead = packed[:, :rank], packed[:rank, rank:]
    for k in range(rank):
        if panel[k, k] == 0:
            panel[k + 1 :, k] = 0.0
            continue
        panel[k + 1 :, k] /= panel[k, k]
        panel[k + 1 :, k + 1 :].addr_(panel[k + 1 :, k], panel[k, k + 1 :], alpha=-1)
    ahead.copy_(torch.linalg.solve_triangular(panel[:rank], ahead, upper=False, unitriangular=True))
    return packed
