"""LoRETTA adapter: low-rank economic tensor-train adaptation (Yang et al. 2024, arXiv:2402.11417).

h + s (f(h D + b_D) U + b_U) after the output of each sub-layer (or, `place="mlp"`, around the feed-forward part: before
its input and after its output, as the authors do for LLaMA), D and U tensor trains; norms train as well. Cores are
normal, so that entries of D and U have variance 1 / (d + bottleneck), but U's last core and bias are zero, which is
ours: `start="random"` is the authors' start, a perturbation of about a fifth of h. Their code unfreezes norms by a
stale name, so which train there is chance; here it is all of them. `head` puts a tensor train in the place of the
dense layer of a new head, as they do in RoBERTa's and DeBERTa's; what else is new trains whole, by `also=`. Their rate
is 1e-4, for thousands of steps.
Use it for adapters that must be tiny on disk; it cannot be merged.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.init import zeros
from ...core.method import Method, Placed, label, weight_at
from ...core.operators.bottleneck import ACTIVATIONS
from ...core.operators.offset import Offset
from ...core.operators.tensor_train import TrainBottleneck, TrainWeight
from ...core.part import Shared
from ...core.places import at_module, blocks_at, norm_parameters, width_of
from ...core.registry import method
from ...model.anatomy import Anatomy
from ...model.evidence import holds


@method("loretta_adp", paper="2402.11417", family="structured")
class LoRETTAAdp(Method):
    """Bottlenecks of tensor trains; each trains two trains, `bottleneck + d` biases, and the norms."""

    mergeable = False
    default_lr = 1e-3

    bottleneck: int = fields.positive(64, "width between D and U")
    train_rank: int = fields.positive(5, "rank of the tensor trains")
    activation: str = fields.choice("relu", tuple(ACTIVATIONS), "non-linearity f")
    scale: float = fields.number(1.0, "factor s of the change", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping a feature of h on the added path")
    start: str = fields.choice("zero", ["zero", "random"], "leave the output as it is at the start, or not")
    place: str = fields.choice("outputs", ["outputs", "mlp"], "after each sub-layer, or around the feed-forward part")
    norms: bool = fields.flag(True, "train scale and shift of every norm")
    head: bool = fields.flag(False, "a tensor train in the place of a new head's dense layer")
    on: Any = fields.sites("block", "which blocks: block for all, or any place in the ones meant")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exact_at_start", self.start == "zero" and not self.head)

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        blocks = blocks_at(base, self.on, self.slug)
        found = 0
        for block in blocks:
            if self.place == "mlp":
                places = {"mlp_in": (block.mlp_in, True), "mlp": (block.mlp_out, False)}
            else:
                places = {"attention": (block.attention_out, False), "mlp": (block.mlp_out, False)}
                if block.attention_out is None and block.mlp_out is None:
                    places = {"ssm": (block.ssm, False)}
            for role, (path, before) in places.items():
                if path is not None:
                    found += 1
                    part = self._part(width_of(block, base, self.slug), before)
                    yield Placed(at_module(path, block, role), part, f"adapter_{role}")
        if not found:
            name = type(base.model).__name__
            raise ValueError(f"loretta_adp: the blocks of {name} have nothing to sit at for place={self.place!r}")
        if self.norms:
            inside = {block.index for block in blocks} | ({None} if len(blocks) == len(base.blocks) else set())
            norms = [s for s in base.sites if s.kind == "norm" and s.role != "norm.head" and s.block in inside]
            for site in norm_parameters(base, norms):
                yield Placed(site, Offset(zeros(*weight_at(base.model, site).shape)), label(site))
        if self.head:
            yield from in_head(base, self)

    def _part(self, width: int, before: bool) -> TrainBottleneck:
        sizes = (width, self.bottleneck, self.train_rank)
        quiet = self.start == "zero"
        return TrainBottleneck(*sizes, self.activation, self.scale, self.dropout, before=before, quiet=quiet)


def in_head(base: Anatomy, method: Method) -> Iterator[Placed]:
    """Tensor trains in the places of a new head's linear layers before the one that makes the logits.

    Raises:
        ValueError: when there are none.
    """
    dense = [
        site
        for site in base.sites
        if site.kind == "linear" and site.parameter == "weight" and site.path != base.head
        and any(holds(new, site.path) for new in base.head_new)
    ]  # fmt: skip
    if not dense:
        name = type(base.model).__name__
        raise ValueError(f"{method.slug}: {name} has no new head with a dense layer before its output; take head=False")
    for site in dense:
        weight = weight_at(base.model, site)
        rank = method.at(site.path).settings()["train_rank"]
        yield Placed(site, TrainWeight(weight.fan_in, weight.fan_out, rank), "head")
