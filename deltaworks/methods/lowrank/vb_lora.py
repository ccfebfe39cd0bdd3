"""VB-LoRA: extreme parameter efficient fine-tuning with vector banks (Li et al. 2024, arXiv:2405.15179).

W' = W + B A, where every piece of `length` values of a row of A or a column of B is a mixture of bank vectors,
v = sum_j softmax(l_top)_j V_top_j: the `top` largest of `vectors` trained logits l choose and weigh, and one bank V is
chosen from by all layers. V ~ U(-0.02, 0.02), l ~ N(0, 0.1^2): the start is small, not zero. Logits learn ten times
faster than the bank. After training only indices and weights are kept (`keep_logits` keeps all), about 1.5 numbers a
piece at top = 2; such an adapter acts and merges but cannot be trained on.
A layer whose widths share no divisor as large as the bank's vectors takes pieces of their beginnings (unless `length`
is given: then it is refused, as in the official code).
Use it to store very many adapters of a large model.
"""

import math
from typing import Any

from ...core import fields
from ...core.experts import mapped
from ...core.init import normal
from ...core.method import WeightMethod, weight_at
from ...core.operators.bank import BankFactors, VectorBank
from ...core.part import Shared
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.anatomy import Anatomy
from ...model.weights import Weight


@method("vb_lora", paper="2405.15179", family="lowrank")
class VBLoRA(WeightMethod):
    """LoRA from a vector bank; trains the bank once and `rank * vectors * (in + out) / length` logits a layer."""

    exact_at_start = False
    default_lr = 1e-3
    ordered = (("top", "vectors", "it chooses among them"),)
    everywhere = ("vectors", "keep_logits")

    rank: int = fields.positive(4, "inner dimension r")
    vectors: int = fields.positive(90, "h, vectors in the bank; the paper takes 2048 for a 7B model")
    length: int | None = fields.positive(
        None, "b, values of a piece, a divisor of all widths; none: a layer's largest up to 256", optional=True
    )
    top: int = fields.positive(2, "k, bank vectors in a mixture")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    keep_logits: bool = fields.flag(False, "keep all logits after training, so that it can go on")

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        weights = [weight_at(base.model, site) for site in base.select(self.on, what="weight")]
        pieces = [self.at(weight.path).piece(weight) for weight in weights]  # type: ignore[attr-defined]
        return {"bank": VectorBank(self.vectors, max(pieces))}

    def piece(self, weight: Weight) -> int:
        """How many values a piece has at a layer."""
        common = math.gcd(weight.fan_in, weight.fan_out)
        if self.length is not None and common % self.length:
            raise ValueError(
                f"vb_lora: length={self.length} does not divide {weight.path} of {weight.fan_out} x {weight.fan_in}; "
                "take a common divisor of both"
            )
        return self.length or max(size for size in range(1, min(common, 256) + 1) if common % size == 0)

    def delta(self, weight: Weight, **given: Any) -> BankFactors:
        bank, length = given["bank"], self.piece(weight)
        a = normal(self.rank, weight.fan_in // length, self.vectors, std=0.1)
        b = normal(weight.fan_out // length, self.rank, self.vectors, std=0.1)
        return BankFactors(a, b, bank, length, self.top, dropout=self.dropout)

    def group(self, name: str) -> dict[str, float]:
        return {} if name == "vectors" else {"lr_scale": 10.0}

    def rules(self) -> list[Rule]:
        return [] if self.keep_logits else [Choice()]

    def count(self, weight: Weight) -> int:
        return self.rank * self.vectors * (weight.fan_in + weight.fan_out) // self.piece(weight)


class Choice(Rule):
    """When training is over, keeps of the logits what they chose."""

    def finished(self, run: Run) -> None:
        for name, part in list(run.tuned.of_kind(BankFactors)):
            run.tuned.exchange(name, mapped(part, BankFactors.chosen))
