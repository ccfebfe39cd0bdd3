"""LoLDU: low-rank adaptation via lower-diagonal-upper decomposition (Shi et al. 2024, arXiv:2410.13618).

W = P L diag(D) U with pivoting;  W' = W + P L_r diag(s z - s0 z0) U_r,  z0 = D_r and s0 = alpha / rank, where z starts
and s stays, unless `train_sigma`, of which the released recipe makes no use. The paper's residual never has to exist,
and loading finds the factors again from the weight; a file holds z, z0 and the first r of P's rows, which place the
change in a copy of the base in another precision as well, and D_r where z starts from something else.
The paper's other starts are for ablation: here whatever z starts from is subtracted, so that the output is the base's;
the authors' code subtracts D for `zeros` and `ones`, which changes it, and draws `uniform` around zero, not the mean.
The only learning rate that they released is the 1e-3 of a demo that trains nothing; `default_lr` is ours.
Pivots come in LU's order, which is not one of importance; take a large rank.
Use it when an adapter may hold only a few hundred numbers a layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...core import fields
from ...core.init import normal, uniform, zeros
from ...core.method import WeightMethod
from ...core.operators.pivots import Pivots
from ...core.registry import method
from ...model.weights import Weight

STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda d: d.mean().abs() * uniform(len(d), bound=0.5).to(d),
    # One pivot has no spread.
    "normal": lambda d: d.mean() + d.std(correction=min(1, len(d) - 1)) * normal(len(d)).to(d),
    "constant": lambda d: d.mean().expand_as(d),
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
}
"""What z starts from instead of the pivots D."""


@method("loldu", paper="2410.13618", family="lowrank")
class LoLDU(WeightMethod):
    """Trained pivots of the weight's LU decomposition; trains `rank` values a layer, and a scale if asked."""

    default_lr = 5e-3

    rank: int = fields.positive(64, "number of pivots, at most the smaller side")
    alpha: float | None = fields.number(None, "numerator of the scale alpha / rank; none for alpha = rank", above=0)
    train_sigma: bool = fields.flag(False, "train the scale, too")
    start: str = fields.choice(
        "pivots",
        ["pivots", *STARTS],
        "of z: D; U(-1/2, 1/2) of D's mean; D's mean and spread, or mean alone; zeros; ones",
    )

    def delta(self, weight: Weight) -> Pivots:
        z = zeros(self._rank(weight)).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        rows = torch.full(z.shape, -1, dtype=torch.int32, device=z.device)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        sigma = z.new_full((1,), scale) if self.train_sigma else None
        pivots = z.clone() if self.start in STARTS else None
        made = Pivots(z, z.clone(), rows, weight.fan_out, weight.fan_in, scale, sigma, pivots)
        made.settle(weight, STARTS.get(self.start))  # experts are stacked before they come to their place
        return made

    def _rank(self, weight: Weight) -> int:
        return min(self.rank, weight.fan_in, weight.fan_out)

    def count(self, weight: Weight) -> int:
        return self._rank(weight) + self.train_sigma
