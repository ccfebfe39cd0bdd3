"""BOFT: parameter-efficient orthogonal fine-tuning via butterfly factorization (Liu et al. 2024, arXiv:2311.06243).

W' = s (W R^T),  R = M_(m-1) ... M_0,  stage i pairs half-blocks h and h + 2^i and turns each pair by a b x b Cayley
rotation of (P^T - P) / 2;  P = 0 and s = 1 at the start. m = 1 is OFT; with enough stages R has no zero.
Stages are applied to the input by index arithmetic; neither R nor a permutation matrix is formed, and no extension is
needed (without one, `peft` silently takes m = 1). The authors' code is that of `peft`, whose examples for diffusion
models take rates of 1e-5 and 3e-5; ours is for language models.
Use it instead of OFT when blocks should mix: few values, yet every input feature reaches every other.
"""

from ...core import fields
from ...core.init import ones, zeros
from ...core.method import WeightMethod
from ...core.operators.rotation import Butterfly
from ...core.registry import method
from ...model.weights import Weight


@method("boft", paper="2311.06243", family="structured")
class BOFT(WeightMethod):
    """Butterfly rotations of the input and scales of the output; stores `m in b + out` values a layer."""

    default_lr = 4e-4

    block: int = fields.whole(4, "side b of a block, even for m > 1; b 2^(m-1) must divide in", low=2)
    stages: int = fields.positive(1, "m, number of butterfly stages; the paper takes b = 8, m = 2")

    dropout: float = fields.fraction(0.0, "share of the blocks of one stage that turn nothing, drawn in every call")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % 2 and self.stages > 1:
            raise ValueError(f"boft: block={self.block} is not allowed; half-blocks are paired, so it must be even")

    def delta(self, weight: Weight) -> Butterfly:
        group = self.block * 2 ** (self.stages - 1)
        if weight.fan_in % group:
            place = weight.path or "a weight"
            raise ValueError(
                f"boft: block={self.block} and stages={self.stages} need an input width divisible by {group}; "
                f"{place} has {weight.fan_in}"
            )
        p = zeros(self.stages, weight.fan_in // self.block, self.block, self.block)
        return Butterfly(p, ones(weight.fan_out), self.dropout)

    def group(self, name: str) -> dict[str, float]:
        # Decay would pull the scales to zero, away from the base.
        return {"weight_decay": 0.0} if name == "s" else {}

    def count(self, weight: Weight) -> int:
        return self.stages * weight.fan_in * self.block + weight.fan_out
