"""PiSSA: principal singular values and singular vectors adaptation (Meng et al. 2024, arXiv:2404.02948).

W = U S V^T;  A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s),  W' = (W - s B0 A0) + s B A,  both factors train.
The residual W - s B0 A0 is not written into the base: the start B0 A0 is subtracted beside it, which is the same
function, leaves the base bit for bit, and makes the result an ordinary LoRA of rank 2r.
Use it instead of LoRA when steps are scarce: training begins in the directions that carry the weight.
"""

import torch

from ...core import fields
from ...core.method import WeightMethod
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...model.weights import Weight


@method("pissa", paper="2404.02948", family="lowrank")
class PiSSA(WeightMethod):
    """LoRA that starts from the principal part of the weight; trains `rank * (in + out)` values a layer."""

    rank: int = fields.positive(8, "inner dimension r; the paper takes 128")
    alpha: float | None = fields.number(None, "numerator of the scale; none for alpha = rank, as the paper", above=0)
    niter: int | None = fields.whole(
        4, "subspace iterations of the fast SVD; none for the exact one", low=1, optional=True
    )

    def delta(self, weight: Weight) -> LowRank:
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        dense = weight.dense()
        rank = min(self.rank, *dense.shape)
        if self.niter is None:
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            u, s, v = u[:, :rank], s[:rank], vh[:rank].T
        else:
            u, s, v = torch.svd_lowrank(dense, q=rank, niter=self.niter)
        root = (s / scale).sqrt()
        a, b = (v * root).T.contiguous(), u * root
        return LowRank(a, b, scale=scale, a0=a.clone(), b0=b.clone())

    def count(self, weight: Weight) -> int:
        return min(self.rank, *weight.shape) * (weight.fan_in + weight.fan_out)
