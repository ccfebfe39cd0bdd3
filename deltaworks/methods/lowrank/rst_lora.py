"""RST-LoRA: a discourse-aware low-rank adaptation (Pu and Demberg 2024, arXiv:2405.00657).

y = W x + s B A ((1 + gamma) * x),  s = alpha / rank: tokens of a long document that its rhetorical structure makes
important weigh more in the branch; the base sees them as they are. A parser gives p(i, j, k), the probability that
unit i is the nucleus of unit j under relation k; `importance_of` turns it into one gamma a unit (`wo`) or one a
relation (`w`, each for a contiguous group of input features), from probabilities (`p`) or from p >= 0.5 (`b`);
`spread` gives every token its unit's. Which layers, the order of binarising, and the groups are not in the paper; no
code is published.
Hand gamma to the model with the batch: `with importance(tuned, gamma): model(**batch)`, backward included.
Use it for summarising long documents that come with a discourse parse, or with any weight of tokens.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import Placed, WeightMethod
from ...core.operators.weighted import Importance, Weighted
from ...core.part import Shared
from ...core.registry import method
from ...core.tuned import Tuned
from ...model.anatomy import Anatomy
from ...model.weights import Weight

VARIANTS = ("p_w", "p_wo", "b_w", "b_wo")


@method("rst_lora", paper="2405.00657", family="lowrank")
class RSTLoRA(WeightMethod):
    """LoRA under token importance; trains `rank * (in + out)` values a layer."""

    mergeable = False
    default_lr = 5e-5
    # Queries and values, its places, are those of an attention.
    refuses = ("mamba",)

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

    def delta(self, weight: Weight, **given: Any) -> Weighted:
        a, b = kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank)
        return Weighted(a, b, given["importance"], scale=self.alpha / self.rank, dropout=self.dropout)

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out)


@contextlib.contextmanager
def importance(tuned: Tuned, gamma: Tensor | None) -> Iterator[None]:
    """Within the block the adapter weighs tokens by `1 + gamma`.

    Args:
        tuned: an `rst_lora` adapter.
        gamma: `batch x tokens` or `batch x tokens x groups`, at least 0; None for none.

    Raises:
        ValueError: when the adapter is of another method, or gamma is negative.
    """
    shared = tuned.state.adapters[tuned.name].shared.get("importance")
    if not isinstance(shared, Importance):
        raise ValueError(f"{tuned.method.slug} does not weigh tokens; importance is for rst_lora")
    if gamma is not None and (gamma.dim() not in (2, 3) or bool((gamma < 0).any())):
        raise ValueError("importance is batch x tokens, or batch x tokens x groups, and never negative")
    before, shared.gamma = shared.gamma, gamma
    try:
        yield
    finally:
        shared.gamma = before


def importance_of(p: Tensor, variant: str) -> Tensor:
    """gamma of every unit of a document from its parse.

    Args:
        p: `units x units x relations`, probability that the first is the nucleus of the second.
        variant: of `VARIANTS`.

    Returns:
        `units x relations` for variants with relations, `units` without.
    """
    if variant not in VARIANTS or p.dim() != 3 or p.shape[0] != p.shape[1]:
        raise ValueError(f"a parse is units x units x relations and a variant one of {', '.join(VARIANTS)}")
    kind, relations = variant.split("_")
    values = (p >= 0.5).to(p.dtype) if kind == "b" else p
    values = values * (1 - torch.eye(len(p), dtype=p.dtype, device=p.device)).unsqueeze(-1)
    mean = values.mean(1)
    return mean if relations == "w" else mean.mean(-1)


def spread(values: Tensor, units: Tensor) -> Tensor:
    """Every token's gamma: that of its unit.

    Args:
        values: `units` or `units x relations`.
        units: `tokens`, index of each token's unit; -1 for a token without one, which gets 0.
    """
    found = values[units.clamp(min=0)]
    return torch.where((units < 0).view(-1, *[1] * (found.dim() - 1)), 0, found)
