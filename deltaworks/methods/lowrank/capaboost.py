"""CapaBoost: increasing model capacity for free (Yang et al. 2024, arXiv:2407.01320).

W' = W + sum_i dW(M_i * theta): `copies` of another method's change share its tensors theta, each under random binary
masks of its own that never change. For LoRA, dW = s sum_i (M_i^B * B)(M_i^A * A), of `copies` times the rank at the
same number of parameters. A shared entry's gradient is the sum over the copies, as true tying gives it; the official
code ties separate layers by hand, and its masks depend on the order of calls, ours on the seed and the layer's name.
Use it over any method that adds to weights (`over=`, with its hyper-parameters in `inner=`) when parameters are scarce
and its rank is what limits it.
"""

from typing import Any

from ...core import fields
from ...core.init import seed_for
from ...core.method import Method, WeightMethod
from ...core.operators.boosted import PATTERNS, Boosted
from ...core.part import Shared
from ...core.registry import make, method
from ...model.anatomy import Anatomy
from ...model.weights import Weight


def _slug(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "the slug of a method"


@method("capaboost", paper="2407.01320", family="lowrank")
class CapaBoost(WeightMethod):
    """Masked copies of another method's change; trains what that method trains."""

    default_lr = 5e-4

    over: str = fields.field("lora", "slug of the method that is boosted", _slug, "the slug of a method")
    inner: dict[str, Any] = fields.mapping("hyper-parameters of that method")
    copies: int = fields.positive(2, "d, number of masked copies")
    density: float = fields.number(0.5, "share of the entries that a mask keeps", above=0, high=1)
    pattern: str = fields.choice("equal", PATTERNS, "entries kept anywhere, or 2 of every 4 neighbours (density 0.5)")
    seed: int = fields.whole(0, "seed of the masks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == "nm" and self.density != 0.5:
            raise ValueError(f"capaboost: pattern=nm keeps half of the entries, density={self.density:g} was given")
        inner = self.boosted
        if isinstance(inner, CapaBoost) or inner.needs_data or inner.rules() or not inner.mergeable:
            raise ValueError(
                f"capaboost: over={self.over!r} cannot be boosted; take one that adds to weights and needs neither "
                "data nor rules in training, such as lora"
            )

    @property
    def boosted(self) -> WeightMethod:
        """The method whose change is copied."""
        inner = make(self.over, **{"on": self.on, **self.inner})
        if not isinstance(inner, WeightMethod):
            raise ValueError(f"capaboost: over={self.over!r} does not change single weights; take such as lora or vera")
        return inner

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        return self.boosted.shared(base)

    def delta(self, weight: Weight, **given: Any) -> Boosted | None:
        method = self.boosted
        delta = method.delta(weight, **given)
        if delta is None:
            return None
        if not delta.additive:
            raise ValueError(f"capaboost: {self.over} does not add to the weight, so copies of it cannot be added up")
        made = Boosted(delta, self.copies, self.density, self.pattern, seed_for(self.seed, weight))
        start = made.dense().detach()
        if method.exact_at_start and not start.is_meta and bool(start.any()):
            raise ValueError(f"capaboost: {self.over} starts from part of the weight, which masks would cut; take lora")
        return made

    def group(self, name: str) -> dict[str, float]:
        return self.boosted.group(name)

    def count(self, weight: Weight) -> int:
        return self.boosted.count(weight)

    def made_of(self) -> list[Method]:
        return [self.boosted]
