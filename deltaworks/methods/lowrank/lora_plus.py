"""LoRA+: efficient low rank adaptation of large models (Hayou et al. 2024, arXiv:2402.12354).

W' = W + s B A,  as LoRA or as any other method with factors A and B;  B and all vectors beside the factors (DoRA's
magnitudes, gates, biases) learn `b_lr_ratio` times as fast as A, in any optimizer and under any schedule, the vectors
without decay. For wide layers this is the ratio under which both factors learn features. What the method scales or
keeps from decay itself stays so, relative to this; at a ratio of 1 nothing differs from it, and where A is frozen the
ratio is but another rate. The paper takes half of LoRA's rate for A, no decay. Factors at an embedding have
`embedding_lr`, whatever the run's rate and the ratio, as in `peft` and the authors' code; what trains in place, such as
a new head, has the run's, its bias too (that of B there).
Use it for LoRA's result in fewer steps, over another method (`over=`, with its hyper-parameters in `inner=`) for that
method's; larger ratios for tasks that are further from pre-training.
"""

import re
from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Method, Placed
from ...core.operators.low_rank import Factored
from ...core.over import Over
from ...core.part import Part, Shared
from ...core.registry import method
from ...model.anatomy import Anatomy

OWN = ("rank", "alpha", "dropout", "rslora")
# What pages call B: most so; that of triplets is P, that between two planes the outermost; LoRETTA's has several cores.
OUTER = ("b", "task_b", "p", "left_out")
# By name and not by shape, as factors of which some entries train are stored as vectors too.
VECTORS = (
    "d", "e", "gain", "l", "lower", "magnitude", "shift", "sigma", "task_sigma", "theta", "u", "upper", "v", "values",
)  # fmt: skip


@method("lora_plus", paper="2402.12354", family="lowrank")
class LoRAPlus(Over):
    """LoRA, or another method, with two learning rates; trains what that method trains."""

    default_lr = 5e-4
    everywhere = (*Over.everywhere, "embedding_lr")
    ours = (*Over.ours, "b_lr_ratio")
    only = tuple((name, other, (value,)) for name in OWN for other, value in (("over", "lora"), ("inner", {})))

    rank: int = fields.positive(8, "inner dimension r of lora")
    alpha: float = fields.number(16.0, "numerator of lora's scale", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of lora's branch")
    rslora: bool = fields.flag(False, "scale lora by alpha / sqrt(rank) instead of alpha / rank")
    b_lr_ratio: float = fields.number(16.0, "learning rate of B over that of A; 4 to 32 are useful", above=0)
    embedding_lr: float = fields.number(1e-6, "learning rate of what trains at embeddings, not the run's", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if _has_ratio(self.under):
            raise ValueError(f"lora_plus: over={self.over!r} has a ratio already; name the method under it")
        if any(rule.owns_step for rule in self.rules()):
            raise ValueError(f"lora_plus: over={self.over!r} steps by itself; put it over lora_plus instead")
        object.__setattr__(self, "default_lr", self.under.default_lr / 2)

    def given(self) -> dict[str, Any]:
        return self.inner or ({name: getattr(self, name) for name in OWN} if self.over == "lora" else {})

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        found = None
        for item in super().parts(base, shared, measured):
            found = found or _has_outer(item.part)
            yield item
        if found is False:
            raise ValueError(
                f"lora_plus: over={self.over!r} trains no factor B, so none can be faster; take such as dora"
            )

    def group(self, name: str) -> dict[str, float]:
        return self._faster(name, super().group(name))

    def group_of(self, name: str) -> dict[str, float]:
        here = self.at(re.sub(r"(\.\d+)+$", "", name).rsplit(".", 2)[0])
        assert isinstance(here, LoRAPlus)
        return here._faster(name, super().group_of(name))

    def group_at(self, name: str, kind: str) -> dict[str, float]:
        own = self.group_of(name)
        return own | {"lr": self.embedding_lr} if kind == "embedding" else own

    def _faster(self, name: str, own: dict[str, float]) -> dict[str, float]:
        vector = _leaf(name) in VECTORS or name.endswith("bias")
        if self.b_lr_ratio == 1.0 or not (vector or _is_outer(name)):
            return own
        rate = {"lr_scale": self.b_lr_ratio * own.get("lr_scale", 1.0)}
        return own | rate | ({"weight_decay": 0.0} if vector else {})


def _has_ratio(method: Method) -> bool:
    return isinstance(method, LoRAPlus) or any(map(_has_ratio, method.made_of()))


def _leaf(name: str) -> str:
    """A tensor's own name; of one of several cores, that of the whole."""
    return re.sub(r"((\.|__)\d+)+$", "", name).rpartition(".")[2]


def _is_outer(name: str) -> bool:
    return _leaf(name) in OUTER or _leaf(name).startswith("b_")  # a bank's, with the layers that borrow it


def _has_outer(part: Part) -> bool:
    """Whether a B trains; butterflies, which are no factors, have a P too."""
    factors = isinstance(getattr(part, "prototype", part), Factored)
    names = [name for name, value in part.named_parameters() if value.requires_grad and _is_outer(name)]
    return any(factors or _leaf(name) in ("b", "task_b") for name in names)
