"""Houlsby adapter: parameter-efficient transfer learning for NLP (Houlsby et al. 2019, arXiv:1902.00751).

N(z) = z + U f(D z + b_D) + b_U after the output of each sub-layer, before its residual is added:
h = LN(x + N(attn(x))),  x' = LN(h + N(ffn(h))).  D, U ~ truncated normal (0.01, cut at two deviations), biases zero;
all norms train as well. The paper's deviation is 0.01, the official code's default 0.001; its GELU is the exact one.
A block that is a single state-space mixer has one adapter after it.
Use it where quality per trained value matters more than speed: it cannot be merged.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.init import zeros
from ...core.method import Method, Placed, label, weight_at
from ...core.operators.bottleneck import ACTIVATIONS, SeriesBottleneck
from ...core.operators.offset import Offset
from ...core.part import Shared
from ...core.places import at_module, blocks_at, norm_parameters, width_of
from ...core.registry import method
from ...model.anatomy import Anatomy


@method("houlsby", paper="1902.00751", family="modules")
class Houlsby(Method):
    """Two bottlenecks a block; trains `2 d m + m + d` values each, and the norms."""

    mergeable = False
    exact_at_start = False
    default_lr = 3e-4

    size: int = fields.positive(64, "bottleneck width m")
    activation: str = fields.choice("gelu", tuple(ACTIVATIONS), "non-linearity f")
    spread: float = fields.number(0.01, "standard deviation of the initial weights", above=0)
    norms: bool = fields.flag(True, "train scale and shift of every norm")
    cross: bool = fields.flag(False, "an adapter after cross-attention as well")
    on: Any = fields.sites("block", "which blocks: block for all, or any place in the ones meant")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        blocks = blocks_at(base, self.on, self.slug)
        found = 0
        for block in blocks:
            outs = {"attention": block.attention_out, "mlp": block.mlp_out}
            if self.cross:
                outs["cross_attention"] = block.cross_attention_out
            if not any(outs.values()):
                outs = {"ssm": block.ssm}
            width = width_of(block, base, self.slug)
            for role, path in outs.items():
                if path is not None:
                    found += 1
                    part = SeriesBottleneck(width, self.size, self.activation, start="houlsby", spread=self.spread)
                    yield Placed(at_module(path, block, role), part, f"adapter_{role}")
        if not found:
            raise ValueError(f"houlsby: {type(base.model).__name__} has blocks without attention and feed-forward part")
        if self.norms:
            inside = {block.index for block in blocks} | ({None} if len(blocks) == len(base.blocks) else set())
            norms = [s for s in base.sites if s.kind == "norm" and s.role != "norm.head" and s.block in inside]
            for site in norm_parameters(base, norms):
                yield Placed(site, Offset(zeros(*weight_at(base.model, site).shape)), label(site))
