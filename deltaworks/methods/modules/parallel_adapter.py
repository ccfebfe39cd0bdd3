"""Scaled parallel adapter: a unified view of parameter-efficient transfer learning (He et al. 2022, arXiv:2110.04366).

sub'(x) = sub(x) + s (U relu(D x + b_D) + b_U),  x what the sub-layer itself reads,  D ~ Kaiming uniform, U = 0, biases
0: exact at the start. The sub-layer is the feed-forward part (best in the paper) or the attention. In a pre-norm block
x is the normalised stream, as in the official code. The paper's MAM is this at the feed-forward part with r = 512 and s
= 4 together with a prefix of 30 positions: attach `prefix_tuning` beside it under another name.
Use it where a bottleneck is wanted that adds no depth: it runs beside the sub-layer. It cannot be merged.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Method, Placed
from ...core.operators.bottleneck import ACTIVATIONS, ParallelBottleneck, Tap, Tape, TappedBottleneck
from ...core.part import Shared
from ...core.places import at_module, blocks_at, ends, width_of
from ...core.registry import method
from ...model.anatomy import Anatomy


@method("parallel_adapter", paper="2110.04366", family="modules")
class ParallelAdapter(Method):
    """A bottleneck beside a sub-layer; trains `2 d r + r + d` values each (and one for a learned scale)."""

    mergeable = False
    default_lr = 1e-4

    size: int = fields.positive(512, "bottleneck width r")
    scale: float = fields.number(4.0, "factor s of the branch", above=0)
    learn_scale: bool = fields.flag(False, "train s, one number a site")
    activation: str = fields.choice("relu", tuple(ACTIVATIONS), "non-linearity")
    beside: str = fields.choice("mlp", ("mlp", "attention", "both"), "the sub-layer it stands beside")
    on: Any = fields.sites("block", "which blocks: block for all, or any place in the ones meant")

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        return {"tape": Tape()}

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        tape = shared["tape"]
        assert isinstance(tape, Tape)
        for block in blocks_at(base, self.on, self.slug):
            for role in ("attention", "mlp") if self.beside == "both" else (self.beside,):
                first, last = ends(block, role)
                if first is None or last is None:
                    continue
                settings: dict[str, Any] = {
                    "width": width_of(block, base, self.slug),
                    "size": self.size,
                    "activation": self.activation,
                    "scale": self.scale,
                    "learn_scale": self.learn_scale,
                }
                if first == last:
                    yield Placed(at_module(first, block, role), ParallelBottleneck(**settings), f"adapter_{role}")
                    continue
                place = 2 * block.index + (role == "mlp")
                yield Placed(at_module(first, block, role), Tap(place, tape), f"tap_{role}")
                part = TappedBottleneck(**settings, place=place, tape=tape)
                yield Placed(at_module(last, block, role), part, f"adapter_{role}")
