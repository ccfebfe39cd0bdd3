"""MoRA: high-rank updating (Jiang et al. 2024, arXiv:2405.12130).

y += decompress(M compress(x)),  M: square, of side floor(sqrt((in + out) rank) + 1/2), zero at the start; as many
parameters as LoRA of `rank`, and a far higher rank. `rotate` (the authors' type 6, for small ranks) turns each block of
the input by its position and gives each its own part of the output; `share` (type 1, for large ranks) adds blocks up.
Both repeat the first inputs to fill the last block; `rotate` drops blocks beyond the output's width, as the code does.
Use it where facts must be memorised, as in continued pre-training.
"""

import math

from ...core import fields
from ...core.init import zeros
from ...core.method import WeightMethod
from ...core.operators.square import Square
from ...core.registry import method
from ...model.weights import Weight


@method("mora", paper="2405.12130", family="lowrank")
class MoRA(WeightMethod):
    """A square matrix between fixed operators; trains about `rank * (in + out)` values a layer."""

    default_lr = 3e-4

    rank: int = fields.positive(8, "rank of the LoRA whose number of parameters it takes")
    kind: str = fields.choice("rotate", ["rotate", "share"], "how inputs are compressed and outputs made")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")

    def delta(self, weight: Weight) -> Square:
        side = self._side(weight)
        return Square(zeros(side, side), self.kind, weight.fan_out, weight.fan_in, dropout=self.dropout)

    def _side(self, weight: Weight) -> int:
        side = math.floor(math.sqrt((weight.fan_in + weight.fan_out) * self.rank) + 0.5)
        return max(side - side % 2, 2) if self.kind == "rotate" else side

    def count(self, weight: Weight) -> int:
        return self._side(weight) ** 2
