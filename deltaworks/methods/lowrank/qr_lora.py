"""QR-LoRA: efficient and disentangled fine-tuning via QR decomposition (Yang et al. 2025, arXiv:2507.04599).

The best rank-r approximation of W is split into Q R, Q with orthonormal columns;  W' = W + s Q dR,  dR trapezoidal as R
and zero at the start, s = alpha / rank. Q stays frozen; the authors' residual base W - s Q R never has to exist.
Adapters from one base share Q (a positive diagonal of R fixes its signs): adding them up adds their dR.
Use it when several adapters are to be combined, such as a style and a content; half of LoRA's parameters.
"""

import torch

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod
from ...core.operators.trapezoid import Trapezoid
from ...core.registry import method
from ...model.weights import Weight


@method("qr_lora", paper="2507.04599", family="lowrank")
class QRLoRA(WeightMethod):
    """A trained trapezoid behind frozen principal columns; trains `rank * in - rank (rank - 1) / 2` values a layer."""

    default_lr = 1e-4

    rank: int = fields.positive(64, "inner dimension r, at most the smaller side")
    alpha: float | None = fields.number(None, "numerator of the scale alpha / rank; none for alpha = rank", above=0)

    def delta(self, weight: Weight) -> Trapezoid:
        rank, fan_in = self._rank(weight), weight.fan_in
        u, s, vh = torch.linalg.svd(weight.dense(), full_matrices=False)
        # Q of U S V^T is U times that of S V^T, a thin matrix; s scales R and leaves Q as it is.
        q, r = torch.linalg.qr(s[:rank, None] * vh[:rank])
        q = u[:, :rank] @ (q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype))
        entries = zeros(rank * fan_in - rank * (rank - 1) // 2)
        return Trapezoid(entries, q, fan_in, scale=1.0 if self.alpha is None else self.alpha / self.rank)

    def _rank(self, weight: Weight) -> int:
        return min(self.rank, weight.fan_in, weight.fan_out)

    def count(self, weight: Weight) -> int:
        rank = self._rank(weight)
        return rank * weight.fan_in - rank * (rank - 1) // 2
