"""LoRETTA, reparameterised: low-rank economic tensor-train adaptation (Yang et al. 2024, arXiv:2402.11417).

LoRA whose factors A (in x r) and B (r x out) are tensor trains of rank t: dW = s (A B - A0 B0)^T,  s = alpha / r, every
core normal so that entries of A have variance 1 / (in + r), those of B 1 / (r + out). All cores are random, so that
each has a gradient from the first step; the start A0 B0 is subtracted, which is ours: with `start="random"`, as in the
authors' code, the output changes. They train the norms as well: `attach(model, LoRETTARep(), also="norm")`. `head` is
that of `loretta_adp`. Their rate is 1e-4, for thousands of steps, with a dropout of 0.05.
Use it for LoRA's form with a tenth of its parameters.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Placed, WeightMethod
from ...core.operators.tensor_train import TrainLowRank, axes, size
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy
from ...model.weights import Weight
from .loretta_adp import in_head


@method("loretta_rep", paper="2402.11417", family="structured")
class LoRETTARep(WeightMethod):
    """Low-rank factors as tensor trains; trains the cores of two trains a layer."""

    everywhere = ("head",)

    rank: int = fields.positive(8, "r, inner dimension of the factors")
    train_rank: int = fields.positive(5, "t, rank of the tensor trains")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / r", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    start: str = fields.choice("subtracted", ["subtracted", "random"], "leave the output as it is at the start, or not")
    head: bool = fields.flag(False, "a tensor train in the place of a new head's dense layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exact_at_start", self.start == "subtracted" and not self.head)

    def delta(self, weight: Weight) -> TrainLowRank:
        sizes = (weight.fan_in, weight.fan_out, self.rank, self.train_rank)
        return TrainLowRank(*sizes, self.start == "subtracted", self.alpha / self.rank, self.dropout)

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        heads = list(in_head(base, self)) if self.head else []
        taken = {item.site.path for item in heads}
        yield from (item for item in super().parts(base, shared, measured) if item.site.path not in taken)
        yield from heads

    def count(self, weight: Weight) -> int:
        return sum(size(axes(width, self.rank), self.train_rank) for width in (weight.fan_in, weight.fan_out))
