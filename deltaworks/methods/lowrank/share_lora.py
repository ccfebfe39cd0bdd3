"""ShareLoRA: low-rank adaptation with shared factors (Song et al. 2024, arXiv:2406.10785).

W' = W + s B A  where all layers of one kind of projection have one trained A (`a`, the default), one B (`b`), or both
(`ab`: the same change everywhere); `qkv` lets queries, keys and values of all layers share one A.
A is Kaiming uniform, B = 0, s = alpha / rank; layers of one kind with different shapes are groups of their own.
The published code shares among the queries and among the values of all layers (on Llama it adapts no others), and has
no `qkv`, which is the paper's variant for self-attention: that keys join it, and B stays each layer's own, is our
reading. Its scripts take a rate of 1e-4, for Llama of 8B; ours is that of `lora`, for smaller bases and short runs.
Use it when even LoRA's parameters are too many, or when several tasks are learned in turn.
"""

import re
from typing import Any

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod, weight_at
from ...core.operators.lent_factors import FactorBank, LentLowRank
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy, Site
from ...model.weights import Weight

ATTENTION = ("attention.query", "attention.key", "attention.value")


@method("share_lora", paper="2406.10785", family="lowrank")
class ShareLoRA(WeightMethod):
    """LoRA with factors shared across layers; a layer adds `rank * out` values (`rank * in` with B shared)."""

    overridable = False

    rank: int = fields.positive(8, "inner dimension r")
    alpha: float = fields.number(16.0, "numerator of the scale alpha / rank", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    share: str = fields.choice("a", ["a", "b", "ab", "qkv"], "what layers of one kind of projection share")

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        shapes: dict[str, tuple[int, int]] = {}
        members = {}
        for site in base.select(self.on, what="weight"):
            weight = weight_at(base.model, site)
            kind = self._kind(site)
            a = None if self.share == "b" else f"a_{kind}_{weight.fan_in}"
            b = f"b_{kind}_{weight.fan_out}" if self.share in ("b", "ab") else None
            if a is not None:
                shapes[a] = (self.rank, weight.fan_in)
            if b is not None:
                shapes[b] = (weight.fan_out, self.rank)
            members[_place(weight)] = a, b
        bank = FactorBank(shapes, members)
        for name, factor in bank.named_parameters():
            if name.startswith("a_"):
                factor.data.copy_(kaiming(*factor.shape))
        return {"bank": bank}

    def _kind(self, site: Site) -> str:
        """The kind of projection: its name without the numbers of blocks."""
        if self.share == "qkv" and site.role in ATTENTION:
            return "attention"
        name = re.sub(r"\.\d+(?=\.)", "", f".{site.path}.{site.parameter}.{site.part or ''}")
        return re.sub(r"\W+", "_", name.strip("."))

    def delta(self, weight: Weight, **given: Any) -> LentLowRank:
        bank: FactorBank = given["bank"]
        lent_a, lent_b = bank.members[_place(weight)]
        return LentLowRank(
            bank,
            lent_a,
            lent_b,
            a=kaiming(self.rank, weight.fan_in) if lent_a is None else None,
            b=zeros(weight.fan_out, self.rank) if lent_b is None else None,
            scale=self.alpha / self.rank,
            dropout=self.dropout,
        )

    def count(self, weight: Weight) -> int:
        own = {"a": weight.fan_out, "qkv": weight.fan_out, "b": weight.fan_in, "ab": 0}
        return self.rank * own[self.share]


def _place(weight: Weight) -> tuple[str, str, int | None]:
    return weight.path, weight.parameter, None if weight.rows is None else weight.rows[0]
