"""The pivots of the weight's own LU decomposition, trained between its triangular factors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from .scaled import Scaled


class Pivots(Scaled):
    """`dW = scale * P L_r diag(z - z0) U_r`, with `W = P L diag(D) U` and z0 the first pivots D.

    Only z is stored. The factors are made from the base's weight when the delta comes to its place, in float64 on the
    CPU, so that every machine finds the same pivots; before that it adds nothing.

    Args:
        z: `rank` pivots.
        fan_out, fan_in: size of the weight.
        scale: multiplies the product.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "fan_in", "scale")
    lower: Tensor | None
    upper: Tensor | None
    start: Tensor | None

    def __init__(self, z: Tensor, fan_out: int, fan_in: int, scale: float = 1.0) -> None:
        super().__init__()
        if z.dim() != 1 or len(z) > min(fan_out, fan_in):
            raise ValueError(f"a weight of {fan_out} x {fan_in} has {min(fan_out, fan_in)} pivots, not {list(z.shape)}")
        self.z = nn.Parameter(z)
        self.fan_out, self.fan_in, self.scale = fan_out, fan_in, float(scale)
        for name in ("lower", "upper", "start"):
            self.register_buffer(name, None, persistent=False)

    def settle(self, weight: Weight) -> None:
        if self.lower is None and weight.device.type != "meta":
            dense = weight.dense()
            self.lower, self.start, self.upper = (made.to(dense) for made in decomposed(dense, len(self.z)))

    def dense(self) -> Tensor:
        return self.z.new_zeros(self.fan_out, self.fan_in) if self.lower is None else super().dense()

    def bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.upper is None or self.lower is None:
            raise RuntimeError(
                "the factors are not there yet; they are made from the weight when an adapter is attached"
            )
        return self.upper.to(dtype), self.lower.to(dtype)

    def scales(self) -> tuple[Tensor, None]:
        return self.z - (0 if self.start is None else self.start), None


def decomposed(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first parts of `W = P L diag(D) U`: `P L_r` (`out x rank`), `D_r`, and `U_r` (`rank x in`) of unit diagonal.

    A pivot below 1e-6 would blow its row of U up; it counts as zero, with a row of zeros, and can never train.
    """
    packed, swaps = torch.linalg.lu_factor(weight.detach().to("cpu", torch.float64))
    order = torch.arange(len(weight))
    for row, other in enumerate((swaps - 1).tolist()):
        order[[row, other]] = order[[other, row]]
    lower = torch.empty(len(weight), rank, dtype=torch.float64)
    lower[order] = packed[:, :rank].tril(-1) + torch.eye(len(weight), rank, dtype=torch.float64)
    pivots = packed.diagonal()[:rank].clone()
    small = pivots.abs() < 1e-6
    upper = packed[:rank].triu() / torch.where(small, 1.0, pivots).unsqueeze(1)
    pivots[small], upper[small] = 0.0, 0.0
    return lower, pivots, upper
