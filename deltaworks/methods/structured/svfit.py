"""SVFit: parameter-efficient fine-tuning using singular values (Sun et al. 2024, arXiv:2409.05926).

W = U S V^T;  W' = W + U_r diag(d) V_r^T,  d = 0 at the start: the first r singular values move, the vectors stay.
The paper's frozen residual W - U_r S_r V_r^T never has to exist. r is given, or the fewest values that hold the share
`energy` of the sum of squares (the paper names a share; squares are our reading), or all. No public code was found:
the rate is ours, and that there is neither a scale nor a bound on the values.
Use it when an adapter may hold a few hundred numbers a layer and the base's own directions are enough.
"""

import torch

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod
from ...core.operators.singular import SpectrumShift
from ...core.registry import method
from ...model.weights import Weight


@method("svfit", paper="2409.05926", family="structured")
class SVFit(WeightMethod):
    """Trained singular values; trains `rank` values a layer."""

    default_lr = 5e-3

    rank: int | None = fields.positive(None, "how many singular values move; none for all", optional=True)
    energy: float | None = fields.number(
        None, "choose rank: the fewest that hold this share of the squares; none to go by rank", above=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.energy is not None:
            raise ValueError(f"svfit: rank={self.rank} and energy={self.energy} both choose the rank; give one")

    def delta(self, weight: Weight) -> SpectrumShift:
        rank = self.count(weight)
        made = SpectrumShift(zeros(rank), zeros(rank).to(weight.dense()), weight.fan_out, weight.fan_in)
        made.settle(weight)
        return made

    def count(self, weight: Weight) -> int:
        full = min(weight.fan_in, weight.fan_out)
        if self.energy is None:
            return full if self.rank is None else min(self.rank, full)
        if weight.device.type == "meta":
            raise ValueError("svfit: energy needs singular values, and there are no weights to find them in; give rank")
        share = torch.linalg.svdvals(weight.dense()).double().square().cumsum(0)
        return min(full, int((share < self.energy * share[-1]).sum()) + 1)
