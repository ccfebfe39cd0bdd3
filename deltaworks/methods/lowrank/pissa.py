"""PiSSA: principal singular values and singular vectors adaptation (Meng et al. 2024, arXiv:2404.02948).

W = U S V^T;  A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s),  W' = (W - s B0 A0) + s B A,  both factors train.
The residual W - s B0 A0 is not written into the base: the start B0 A0 is subtracted beside it, which is the same
function, leaves the base bit for bit, and makes the result an ordinary LoRA of rank 2r. `split` is QPiSSA, where the
residual is quantised, which loses far less than quantising the weight, and so has to be in the base.
The official scripts take a rate of 2e-5, that of full fine-tuning, at rank 128 of a 7B base; ours is that of `lora`.
Use it instead of LoRA when steps are scarce: training begins in the directions that carry the weight.
"""

import torch
from torch import Tensor, nn

from ...core import fields
from ...core.attach import find_state, install
from ...core.init import svd_lowrank
from ...core.method import Placed, WeightMethod, label, weight_at
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...core.tuned import Tuned
from ...model.anatomy import describe
from ...model.rounding import rounding
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
        a, b = self.principal(weight.dense())
        return LowRank(a, b, scale=self.scale, a0=a.clone(), b0=b.clone())

    @property
    def scale(self) -> float:
        """s, the factor of the product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def principal(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """A (`r x in`) and B (`out x r`) whose product, times s, is the best approximation of a matrix."""
        rank = min(self.rank, *dense.shape)
        if self.niter is None:
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            u, s, v = u[:, :rank], s[:rank], vh[:rank].T
        else:
            u, s, v = svd_lowrank(dense, rank, self.niter)
        root = (s / self.scale).sqrt()
        return (v * root).T.contiguous(), u * root

    def count(self, weight: Weight) -> int:
        return min(self.rank, *weight.shape) * (weight.fan_in + weight.fan_out)


@torch.no_grad()
def split(model: nn.Module, method: PiSSA, *, quantize: str = "nf4", iterations: int = 5, seed: int = 0) -> Tuned:
    """QPiSSA: move the principal part of a base that is to be quantised into an adapter; the base keeps the residual.

    In turn, `iterations` times: A and B from the best approximation of `W - Q`, and `Q = quantised(W - s B A)`, from
    Q = 0. Unlike anything else here this changes the base's own weights, in place. Save both, with
    `model.save_pretrained(folder)` and `dw.save(tuned, adapter)`; open them by `load_base(folder, quantize=...)` and
    `dw.load(model, adapter)`.

    Args:
        model: the base, not quantised, with nothing attached.
        quantize: how it will be, "nf4", "int8" or "int4".
        iterations: T; 1 quantises the residual of plain PiSSA.
        seed: of the fast SVD.

    Raises:
        ValueError: when the model is adapted or quantised already, or a site is not the weight of one linear layer.
    """
    if find_state(model) is not None:
        raise ValueError("pissa: split takes a base with nothing attached; call dw.detach(model) first")
    base, placed = describe(model), []
    through = rounding(quantize, base)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for site in base.select(method.on, what="weight"):
            weight, here = weight_at(model, site), method.at(site.path)
            if weight.quantised or weight.stored is None or site.kind != "linear" or site.rows is not None:
                raise ValueError(f"pissa: split takes whole linear layers that are not quantised; {site.name} is not")
            assert isinstance(here, PiSSA)
            dense = weight.dense()
            stored = torch.zeros_like(dense)
            for _ in range(iterations):
                a, b = here.principal(dense - stored)
                residual = dense - here.scale * (b @ a)
                stored = through(residual)
            weight.stored.copy_(weight.layout(residual))
            placed.append(Placed(site, LowRank(a, b, scale=here.scale), label(site)))
    return install(model, method, placed, {})
