"""OLoRA: orthonormal low-rank adaptation (Büyükakyüz 2024, arXiv:2406.01775).

W = Q R;  B = the first r columns of Q, A = the first r rows of R,  W' = (W - s B0 A0) + s B A,  both factors train.
As with PiSSA, the start is subtracted beside the base, which stays as it is. Signs are fixed by a positive diagonal of
R, so that every machine starts from the same factors; as in `peft`, A = R is not scaled by s.
Use it like PiSSA, when steps are scarce and a decomposition must be cheap: only r columns are factored.
"""

import torch

from ...core import fields
from ...core.method import WeightMethod
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...model.weights import Weight


@method("olora", paper="2406.01775", family="lowrank")
class OLoRA(WeightMethod):
    """LoRA that starts from the QR decomposition of the weight; trains `rank * (in + out)` values a layer."""

    default_lr = 3e-4

    rank: int = fields.positive(32, "inner dimension r")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)

    def delta(self, weight: Weight) -> LowRank:
        dense, rank = weight.dense(), self._rank(weight)
        q, r = torch.linalg.qr(dense[:, :rank])
        sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        b = q * sign
        # The rest of R's first rows are the products of the same columns with the rest of the weight.
        a = torch.cat([r * sign.unsqueeze(1), b.T @ dense[:, rank:]], dim=1)
        return LowRank(a, b, scale=self.alpha / self.rank, a0=a.clone(), b0=b.clone())

    def _rank(self, weight: Weight) -> int:
        return min(self.rank, weight.fan_in, weight.fan_out)

    def count(self, weight: Weight) -> int:
        return self._rank(weight) * (weight.fan_in + weight.fan_out)
