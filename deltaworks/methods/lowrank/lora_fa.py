"""LoRA-FA: memory-efficient low-rank adaptation (Zhang et al. 2023, arXiv:2308.03303).

W' = W + s B A,  A random and frozen,  B = 0 and trained,  s = alpha / rank.  Training keeps `x A^T` and never `x`.
`project` is the paper's later form: B's gradient becomes g (A A^T)^-1 / s^2, the best approximation of the full
gradient G within A's row space, so that a step of gradient descent changes W by -lr G A^T (A A^T)^-1 A.
The authors publish no code; A is drawn as `peft` draws it, Kaiming uniform, and the rate is that of `lora`.
Use it when activations, not weights, fill the memory.
"""

import torch

from ...core import fields
from ...core.experts import setting
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight


@method("lora_fa", paper="2308.03303", family="lowrank")
class LoRAFA(WeightMethod):
    """LoRA with a frozen A; trains `rank * out` values a layer."""

    everywhere = ("project",)

    rank: int = fields.positive(8, "inner dimension r")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    project: bool = fields.flag(False, "turn B's gradient into the best approximation of the weight's full gradient")

    def delta(self, weight: Weight) -> LowRank:
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        return LowRank(a, b, scale=self.alpha / self.rank, dropout=self.dropout, train_a=False)

    def rules(self) -> list[Rule]:
        return [Projection()] if self.project else []

    def count(self, weight: Weight) -> int:
        return self.rank * weight.fan_out


class Projection(Rule):
    """Replaces the gradient g of every B by `g (A A^T + 1e-8 I)^-1 / s^2`, in at least float32."""

    def gradients(self, run: Run) -> None:
        for _, part in run.tuned.of_kind(LowRank):
            a, b = part.get_parameter("a"), part.get_parameter("b")
            if b.grad is not None:
                gram = a @ a.mT + 1e-8 * torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
                g = torch.linalg.solve(gram, b.grad.to(a.dtype).mT).mT
                b.grad.copy_(g / setting(part, "scale") ** 2)
