"""Asymmetry in low-rank adapters: which factor to train (Zhu et al. 2024, arXiv:2402.16842).

W' = W + s B A,  each factor with a start and a flag of its own. The finding: with A a random orthonormal projection and
only B trained, LoRA loses nothing; A's role is to read features, and random ones do. Starts of A: `rand` (orthonormal
rows), `he` (Kaiming uniform), `v` (right singular vectors of W), `zero`; of B: `zero`, `rand` (orthonormal columns),
`he`, `u` (left singular vectors). The authors' code takes columns of V^T for `v`; these are its rows.
Use it at twice LoRA's rank for the same number of parameters.
"""

import torch
from torch import Tensor

from ...core import fields
from ...core.init import kaiming, uniform, zeros
from ...core.method import WeightMethod
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...model.weights import Weight


@method("lora_asym", paper="2402.16842", family="lowrank")
class LoRAAsym(WeightMethod):
    """LoRA with one random frozen factor; trains `rank * out` values a layer (or `rank * in`, or both)."""

    default_lr = 4e-4

    rank: int = fields.positive(8, "inner dimension r")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    train: str = fields.choice("b", ["b", "a", "both"], "the factor that trains")
    a: str | None = fields.choice(None, [None, "rand", "he", "v", "zero"], "start of A; none: zero if only A trains")
    b: str | None = fields.choice(
        None, [None, "zero", "rand", "he", "u"], "start of B; none: zero unless only A trains"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        a, b = self.starts
        if a == b == "zero" or {"b": a, "a": b}.get(self.train) == "zero":
            raise ValueError(
                f"lora_asym: train={self.train!r} from A {a!r} and B {b!r} has no gradient; start one elsewhere"
            )

    @property
    def starts(self) -> tuple[str, str]:
        """Where A and B start."""
        only_a = self.train == "a"
        return self.a or ("zero" if only_a else "rand"), self.b or ("rand" if only_a else "zero")

    def delta(self, weight: Weight) -> LowRank:
        fan_out, fan_in, rank = weight.fan_out, weight.fan_in, self._rank(weight)
        a, b = self.starts
        vectors = {}
        if a == "v" or b == "u":
            u, _, vh = torch.linalg.svd(weight.dense(), full_matrices=False)
            vectors = {"v": vh[:rank].contiguous(), "u": u[:, :rank].contiguous()}
        start_a = vectors["v"] if a == "v" else drawn(a, rank, fan_in)
        start_b = vectors["u"] if b == "u" else drawn(b, fan_out, rank)
        return LowRank(
            start_a,
            start_b,
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            train_a=self.train != "b",
            train_b=self.train != "a",
        )

    def _rank(self, weight: Weight) -> int:
        return min(self.rank, weight.fan_in, weight.fan_out)

    def count(self, weight: Weight) -> int:
        sides = {"b": weight.fan_out, "a": weight.fan_in, "both": weight.fan_in + weight.fan_out}
        return self._rank(weight) * sides[self.train]


def drawn(start: str, rows: int, columns: int) -> Tensor:
    """`rand`: orthonormal rows, or columns, whichever are fewer; `he`: Kaiming uniform; `zero`."""
    if start == "he":
        return kaiming(rows, columns)
    if start == "zero":
        return zeros(rows, columns)
    q, _ = torch.linalg.qr(uniform(max(rows, columns), min(rows, columns), bound=0.5))
    return q if rows >= columns else q.T.contiguous()
