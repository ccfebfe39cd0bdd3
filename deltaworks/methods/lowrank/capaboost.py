"""CapaBoost: increasing model capacity for free (Yang et al. 2024, arXiv:2407.01320).

`copies` of another method's change share its tensors, each under random binary masks of its own that never change, and
are added up. For LoRA dW = s sum_i (M_i^B * B)(M_i^A * A), of `copies` times the rank at the same number of parameters,
also where a factor is frozen or shared. For a bottleneck sum_i [(M_i^up * U) f((M_i^down * D) h + b_D) + b_U], biases
unmasked. Any other change that adds to weights is sum_i dW(M_i * theta) with theta what trains; random matrices that
layers share (VeRA) and singular vectors of the weight (SVFit) stay whole, and so does what changes vectors, as norms.
A shared entry's gradient is the sum over the copies, as true tying gives it; the official code ties separate layers by
hand, and its masks depend on the order of calls, ours on the seed and the layer's name. For prefix-tuning every linear
map of its MLP is z = sum_i (M_i * W) x + b, as the paper has linear maps; the released code masks no prefix this way.
Use it over another method (`over=`, with its hyper-parameters in `inner=`) when parameters are scarce and its rank is
what limits it.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Placed, weight_at
from ...core.operators.boosted import has_matrices, masked_copies
from ...core.operators.boosted_prefix import boosted_encoder
from ...core.operators.masks import PATTERNS, Masks
from ...core.operators.prefix import PrefixEncoder
from ...core.over import Over
from ...core.part import Part, Shared
from ...core.registry import method
from ...core.rule import Rule
from ...model.anatomy import Anatomy
from ...model.weights import Weight

WHILE_TRAINING = ("attached", "step_begin", "gradients", "step_end", "epoch_end", "penalty", "own_step")


@method("capaboost", paper="2407.01320", family="lowrank")
class CapaBoost(Over):
    """Masked copies of another method's change; trains what that method trains."""

    default_lr = 5e-4

    copies: int = fields.positive(2, "d, number of masked copies")
    density: float = fields.number(0.5, "share of the entries that a mask keeps", above=0, high=1)
    pattern: str = fields.choice("equal", PATTERNS, "entries kept anywhere, or 2 of every 4 neighbours (density 0.5)")
    seed: int = fields.whole(0, "seed of the masks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == "nm" and self.density != 0.5:
            raise ValueError(f"capaboost: pattern=nm keeps half of the entries, density={self.density:g} was given")
        if isinstance(self.under, CapaBoost) or self.needs_data or any(map(_acts, self.rules())):
            raise ValueError(
                f"capaboost: over={self.over!r} cannot be boosted; take a method that needs neither data nor rules in "
                "training, such as lora or houlsby"
            )

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        lent = super().shared(base)
        if self.overrides and any(isinstance(module, PrefixEncoder) for module in lent.values()):
            raise ValueError(f"capaboost: over={self.over!r} shares its first map among layers; leave overrides out")
        try:
            return {key: boosted_encoder(module, self._masks(key)) for key, module in lent.items()}
        except ValueError as error:
            raise ValueError(f"capaboost: over={self.over!r}: {error}") from None

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        found = None
        for item in super().parts(base, shared, measured):
            weight, here = weight_at(base.model, item.site), self.at(item.site.path)
            boosts = has_matrices(item.part, weight)
            found = found or boosts
            if boosts:
                assert isinstance(here, CapaBoost)
                item = dataclasses.replace(item, part=here._copies(item, weight))
            yield item
        if found is False:
            raise ValueError(f"capaboost: over={self.over!r} changes no matrix, so no rank can rise; take such as lora")

    def _copies(self, item: Placed, weight: Weight) -> Part:
        masks = self._masks(f"{item.site.path} {item.label}")
        try:
            return masked_copies(item.part, weight, masks, fixed=self.mergeable, exact=self.exact_at_start)
        except ValueError as error:
            raise ValueError(f"capaboost: over={self.over!r} at {item.site.name}: {error}") from None

    def _masks(self, owner: str) -> Masks:
        return self.copies, self.density, self.pattern, zlib.crc32(f"{self.seed} {owner}".encode())


def _acts(rule: Rule) -> bool:
    """Whether a rule does more than to put the finished adapter in a smaller form, which is for the parts it knows."""
    return any(getattr(type(rule), event) is not getattr(Rule, event) for event in WHILE_TRAINING)
