"""MeZO: fine-tuning language models with just forward passes (Malladi et al. 2023, arXiv:2305.17333).

z ~ N(0, I) from a seed,  d = (L(p + eps z) - L(p - eps z)) / (2 eps),  p <- p - lr (d z + wd p).
z is drawn again from its seed wherever it is needed, so a step holds what inference holds, and the whole run is
written down by a (seed, d, lr) per step. As in the authors' code both passes run in evaluation mode on the same
batch, and biases and norms do not decay. `over` names the method whose tensors move: all of them, or an adapter's.
Use it when not even one backward pass fits; count on a hundred times the steps.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Method, Placed
from ...core.part import Shared
from ...core.registry import make, method
from ...core.rule import Rule
from ...core.zeroth_order import ZerothOrder
from ...model.anatomy import Anatomy

EPS = {"full": 1e-3, "lora": 1e-2, "prefix_tuning": 1e-1}
RATES = {"lora": 5e-5, "prefix_tuning": 1e-3}


@method("mezo", paper="2305.17333", family="fullparam")
class MeZO(Method):
    """Zeroth-order optimisation; trains what the method `over` trains, without gradients."""

    overridable = False
    default_lr = 1e-6

    over: str = fields.field(
        "full",
        "method whose tensors move: full (lr 1e-7 to 1e-6), lora (5e-5 to 1e-4), prefix_tuning (1e-3 to 1e-2), ...",
        lambda value: None if isinstance(value, str) and value not in ("", "mezo") else "the name of another method",
        "the name of another method",
    )
    settings_of_over: dict[str, Any] = fields.mapping("hyper-parameters of that method")
    eps: float | None = fields.number(
        None, "size of the perturbation; none for the paper's: 1e-3, over lora 1e-2, over prefix_tuning 1e-1", above=0
    )
    weight_decay: float = fields.number(0.0, "wd, decay of matrices, within the same step", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.inner  # a wrong name or setting must show here, not when attaching
        object.__setattr__(self, "over", inner.slug)
        usual = type(self).default_lr if inner.family == "fullparam" else RATES["lora"]
        object.__setattr__(self, "default_lr", RATES.get(inner.slug, usual))

    @property
    def inner(self) -> Method:
        """The method whose tensors move.

        Raises:
            ValueError: when there is none of this name, or it cannot be trained without gradients or needs data.
        """
        inner = make(self.over, **self.settings_of_over)
        if inner.needs_data:
            raise ValueError(f"mezo: over={self.over!r} measures data first; take full, lora or prefix_tuning")
        for rule in inner.rules():
            if rule.owns_step or type(rule).gradients is not Rule.gradients:
                raise ValueError(f"mezo: over={self.over!r} lives on gradients, of which mezo computes none; take lora")
        return inner

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        return self.inner.shared(base)

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        return self.inner.parts(base, shared, measured)

    def rules(self) -> list[Rule]:
        eps = self.eps if self.eps is not None else EPS.get(self.over, 1e-2)
        return [*self.inner.rules(), ZerothOrder(eps, weight_decay=self.weight_decay)]

    def group(self, name: str) -> dict[str, float]:
        return self.inner.group(name)

    def group_of(self, name: str) -> dict[str, float]:
        return self.inner.group_of(name)

    def made_of(self) -> list[Method]:
        return [self.inner]
