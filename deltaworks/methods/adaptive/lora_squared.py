"""LoRA^2: multi-scale low-rank approximations (Zhang et al. 2024, arXiv:2408.06854).

W' = W + alpha / (r + 1e-5) Bo Ao diag(e) Bi Ai,  Ai: k x in, Bi: r x k, Ao: k x r, Bo: out x k, all ~ N(0, 0.02^2),
e = 0.
Components e_i fall to a budget as in AdaLoRA, but only e, the rows of Bi and the columns of Ao are scored: `2 r k + r`
values instead of all. Penalty: each factor's distance from orthogonality (on its smaller side), and where in = out the
planes' from each other, ||Bi Ai Bo Ao||; the authors' code computes that product and then adds something else, and its
merge only runs for r = 1. Their rates, 5e-4 to 2.2e-3, are for 5 to 50 epochs: under four factors near zero e moves
the weight slowly, and ours is for shorter runs.
Use it as AdaLoRA when scoring every entry costs too much.
"""

import torch
from torch import Tensor

from ...core import fields
from ...core.init import normal, zeros
from ...core.operators.two_planes import TwoPlanes
from ...core.registry import method
from ...core.rule import Rule, Run, pooled
from ...model.weights import Weight
from .adalora import AdaLoRA, Budget


@method("lora_squared", paper="2408.06854", family="adaptive")
class LoRASquared(AdaLoRA):
    """Nested low rank under a falling budget; trains `width * (in + out) + 2 r width + r` values a layer."""

    # Four small factors lie around e, so what a step changes is far less than in a LoRA.
    default_lr = 1e-2

    width: int = fields.positive(8, "k, of the outer factors")
    init_rank: int = fields.positive(8, "r, components of every layer at the start")
    target_rank: int = fields.positive(3, "average number of components of the layers at the end")

    def delta(self, weight: Weight) -> TwoPlanes:  # type: ignore[override]
        k, r, std = self.width, self.init_rank, 0.02
        right_in, right = normal(k, weight.fan_in, std=std), normal(r, k, std=std)
        left, left_out = normal(k, r, std=std), normal(weight.fan_out, k, std=std)
        return TwoPlanes(left_out, left, zeros(r), right, right_in, self.alpha / (r + 1e-5), self.dropout)

    def rules(self) -> list[Rule]:
        return [PlaneBudget(self)]

    def count(self, weight: Weight) -> int:
        k, r = self.width, self.init_rank
        return k * (weight.fan_in + weight.fan_out) + 2 * r * k + r


class PlaneBudget(Budget):
    """AdaLoRA's budget on the inner factors, with a penalty on all four."""

    def penalty(self, run: Run) -> Tensor | None:
        if not self.method.gamma:
            return None
        norms, across = [], []
        names = ("left_out", "left", "right", "right_in")
        for _, (left_out, left, right, right_in) in run.tuned.tensors_of(TwoPlanes, *names):
            for factor in (left_out, left, right, right_in):
                thin = factor if factor.shape[-2] <= factor.shape[-1] else factor.mT
                identity = torch.eye(thin.shape[-2], dtype=thin.dtype, device=thin.device)
                norms.append(torch.linalg.matrix_norm(thin @ thin.mT - identity))
            if left_out.shape[-2] == right_in.shape[-1]:
                between = (right @ (right_in @ left_out)) @ left
                across.append(torch.linalg.matrix_norm(between))
        return self.method.gamma * pooled(pooled(kind).mean() for kind in (norms, across) if kind).sum()
