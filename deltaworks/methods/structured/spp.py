"""SPP: sparsity-preserved parameter-efficient fine-tuning (Lu et al. 2024, arXiv:2405.16057).

W'[i, j] = W[i, j] (1 + s Wa[g(i), j] Wb[i]),  Wa: r x in ~ Kaiming uniform, each row for one of r groups of outputs,
Wb: out = 0,  s = 2 (the authors' 16 / 8). What was pruned stays zero through training and merging,
whatever the pattern (2:4 or any). The authors' merge multiplies Wb along the wrong axis; this follows their training.
Where r does not divide out, groups differ by one output. Without dropout the weight is built anew in every call:
two passes over it, where a branch beside it, as the authors have, takes a second product and r passes over the input.
Use it to tune a model that was pruned before, and keep it sparse.
"""

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.multiplied import Multiplied
from ...core.registry import method
from ...model.weights import Weight


@method("spp", paper="2405.16057", family="structured")
class SPP(WeightMethod):
    """Factors of the weight's entries; trains `rank * in + out` values a layer."""

    default_lr = 4e-3

    rank: int = fields.positive(16, "r, groups of outputs, at most as many as there are outputs")
    scale: float = fields.number(2.0, "factor s of the change", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch; 0.05 in the code")

    def delta(self, weight: Weight) -> Multiplied:
        a = kaiming(self._rank(weight), weight.fan_in)
        return Multiplied(a, zeros(weight.fan_out), scale=self.scale, dropout=self.dropout)

    def _rank(self, weight: Weight) -> int:
        return min(self.rank, weight.fan_out)

    def count(self, weight: Weight) -> int:
        return self._rank(weight) * weight.fan_in + weight.fan_out
