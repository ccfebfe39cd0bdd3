"""RST-LoRA: a discourse-aware low-rank adaptation (Pu and Demberg 2024, arXiv:2405.00657).

y = W x + s B A ((1 + gamma) * x),  s = alpha / rank: tokens of a long document that its rhetorical structure makes
important weigh more in the branch; the base sees them as they are. A parser gives p(i, j, k), the probability that
unit i is the nucleus of unit j under relation k; `importance_of` turns it into one gamma a unit (`wo`) or one a
relation (`w`, each for a contiguous group of input features), from probabilities (`p`) or from p >= 0.5 (`b`);
`spread` gives every token its unit's. Which layers (here q and v), whether binary comes before the mean (it does), how
relations become groups of features (in order) and what a decoder behind an encoder has (gamma = 0) are not in the
paper; no code is published.
gamma comes with the batch: `model(**batch, importance=gamma)` or `model(**batch, parse=p, units=units)`, of which
`variant` makes it; where a call cannot carry it, as in generation, `with importance(tuned, gamma): ...`. `aligned`
finds the tokens of a parse's units, `overlap` stands in for a parser. Without gamma it trains as LoRA, and says so.
Use it for summarising long documents that come with a discourse parse, or with any weight of tokens.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import Placed, WeightMethod
from ...core.operators.weighted import (
    VARIANTS,
    Bearer,
    Importance,
    Weighted,
    aligned,
    gamma_of,
    importance_of,
    overlap,
    spread,
)
from ...core.part import Shared
from ...core.registry import method
from ...core.rule import Rule, Run
from ...core.tuned import Tuned
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight

__all__ = ["RSTLoRA", "aligned", "importance", "importance_of", "overlap", "spread"]


class Unweighed(Rule):
    """Warns behind the first step when no token was weighed in it."""

    sees_gradients = False

    def step_end(self, run: Run) -> None:
        found = run.tuned.shared["importance"]
        if run.step == 1 and isinstance(found, Importance) and not found.weighed:
            warnings.warn("rst_lora: the batch brought no importance of its tokens, so it trains as lora", stacklevel=2)


@method("rst_lora", paper="2405.00657", family="lowrank")
class RSTLoRA(WeightMethod):
    """LoRA under token importance; trains `rank * (in + out)` values a layer."""

    mergeable = False
    default_lr = 5e-5
    # Queries and values, its places, are those of an attention.
    refuses = ("mamba",)
    everywhere = ("variant",)

    on: Any = fields.sites(["attention.query", "attention.value"])
    rank: int = fields.positive(8, "inner dimension r")
    alpha: float = fields.number(32.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.1, "probability of dropping an input feature of the branch")
    variant: str = fields.choice(
        "p_w", VARIANTS, "how gamma is made: probabilities or binary, with relations or without"
    )

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        return {"importance": Importance()}

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        encoded = any(block.stack == "encoder" for block in base.blocks)
        for placed in super().parts(base, shared, measured):
            block = placed.site.block
            behind = encoded and block is not None and base.blocks[block].stack == "decoder"
            if isinstance(placed.part, Weighted) and behind:
                placed.part.reads = False
            yield placed
        whole = Site("", role=None, kind="other", parameter=None)
        importance = shared["importance"]
        assert isinstance(importance, Importance)
        yield Placed(whole, Bearer(importance, self.variant), "importance")

    def rules(self) -> list[Rule]:
        return [Unweighed()]

    def delta(self, weight: Weight, **given: Any) -> Weighted:
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        return Weighted(a, b, given["importance"], scale=self.alpha / self.rank, dropout=self.dropout)

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out)


@contextlib.contextmanager
def importance(tuned: Tuned, gamma: Tensor | None) -> Iterator[None]:
    """Within the block the adapter weighs tokens by `1 + gamma`, whatever the calls bring.

    Args:
        tuned: an `rst_lora` adapter.
        gamma: `batch x tokens` or `batch x tokens x groups`, at least 0; None for none.

    Raises:
        ValueError: when the adapter is of another method, or gamma is negative.
    """
    shared = tuned.shared.get("importance")
    if not isinstance(shared, Importance):
        raise ValueError(f"{tuned.method.slug} does not weigh tokens; importance is for rst_lora")
    before = shared.gamma, shared.held
    shared.gamma, shared.held = gamma_of(gamma, None, None, "p_w"), True
    try:
        yield
    finally:
        shared.gamma, shared.held = before
