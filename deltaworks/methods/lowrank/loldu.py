"""LoLDU: low-rank adaptation via lower-diagonal-upper decomposition (Shi et al. 2024, arXiv:2410.13618).

W = P L diag(D) U with pivoting;  W' = W + s P L_r diag(z - D_r) U_r,  z = D_r at the start and all that trains,
s = alpha / rank. The paper's residual never has to exist, and loading finds the factors again from the weight; a file
holds z, D_r and the first r of P's rows, which place the change in a copy of the base in another precision as well.
Pivots come in LU's order, which is not one of importance; take a large rank.
Use it when an adapter may hold only a few hundred numbers a layer.
"""

import torch

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod
from ...core.operators.pivots import Pivots
from ...core.registry import method
from ...model.weights import Weight


@method("loldu", paper="2410.13618", family="lowrank")
class LoLDU(WeightMethod):
    """Trained pivots of the weight's LU decomposition; trains `rank` values a layer."""

    default_lr = 5e-3

    rank: int = fields.positive(64, "number of pivots, at most the smaller side")
    alpha: float | None = fields.number(None, "numerator of the scale alpha / rank; none for alpha = rank", above=0)

    def delta(self, weight: Weight) -> Pivots:
        z = zeros(self.count(weight)).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        rows = torch.full_like(z, -1, dtype=torch.int32)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        made = Pivots(z, z.clone(), rows, weight.fan_out, weight.fan_in, scale)
        made.settle(weight)  # experts are stacked before they come to their place
        return made

    def count(self, weight: Weight) -> int:
        return min(self.rank, weight.fan_in, weight.fan_out)
