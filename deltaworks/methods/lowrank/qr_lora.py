"""QR-LoRA: efficient and disentangled fine-tuning via QR decomposition (Yang et al. 2025, arXiv:2507.04599).

The best rank-r approximation of W is split into s Q R, Q with orthonormal columns;  W' = W + s Q dR,  dR trapezoidal as
R and zero at the start, s = alpha / rank. Q stays frozen; the authors' residual base W - s Q R never has to exist.
Adapters from one base share Q (a positive diagonal of R fixes its signs): adding them up adds their dR.
`train="full"` is their `qr`, for one task alone: LoRA from B = Q and A = R, all entries trained, the start subtracted
beside the base as with PiSSA. Their scripts give both 1e-4, and a dR of zeros, though 0.01 N(0, 1) is their default.
Use it when several adapters are to be combined, such as a style and a content; half of LoRA's parameters.
"""

import torch

from ...core import fields
from ...core.init import normal, zeros
from ...core.method import WeightMethod
from ...core.operators.low_rank import LowRank
from ...core.operators.trapezoid import Trapezoid
from ...core.registry import method
from ...model.weights import Weight


@method("qr_lora", paper="2507.04599", family="lowrank")
class QRLoRA(WeightMethod):
    """A trapezoid behind frozen columns; trains `rank * in - rank (rank - 1) / 2` values a layer, in full LoRA's."""

    default_lr = 1e-4
    only = (("start", "train", ("delta",)),)

    rank: int = fields.positive(64, "inner dimension r, at most the smaller side")
    alpha: float | None = fields.number(None, "numerator of the scale alpha / rank; none for alpha = rank", above=0)
    train: str = fields.choice("delta", ["delta", "full"], "dR behind a frozen Q, or both Q and R")
    start: str = fields.choice("zero", ["zero", "random"], "of dR: zeros, or 0.01 N(0, 1), which changes the output")

    def __post_init__(self) -> None:
        super().__post_init__()
        starts = (self.start, *(there.get("start") for there in self.overrides.values()))
        object.__setattr__(self, "exact_at_start", "random" not in starts)

    def delta(self, weight: Weight) -> Trapezoid | LowRank:
        rank, scale = self._rank(weight), 1.0 if self.alpha is None else self.alpha / self.rank
        u, s, vh = torch.linalg.svd(weight.dense(), full_matrices=False)
        # Q of U S V^T is U times that of S V^T, a thin matrix; s scales R and leaves Q as it is.
        q, r = torch.linalg.qr(s[:rank, None] * vh[:rank])
        sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        q = u[:, :rank] @ (q * sign)
        if self.train == "full":
            r = r * sign.unsqueeze(1) / scale
            return LowRank(r, q, scale=scale, a0=r.clone(), b0=q.clone())
        entries = rank * weight.fan_in - rank * (rank - 1) // 2
        dr = zeros(entries) if self.start == "zero" else normal(entries, std=0.01)
        return Trapezoid(dr, q, weight.fan_in, scale=scale)

    def _rank(self, weight: Weight) -> int:
        return min(self.rank, weight.fan_in, weight.fan_out)

    def count(self, weight: Weight) -> int:
        rank = self._rank(weight)
        if self.train == "full":
            return rank * (weight.fan_in + weight.fan_out)
        return rank * weight.fan_in - rank * (rank - 1) // 2
