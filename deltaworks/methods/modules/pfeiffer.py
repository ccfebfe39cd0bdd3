"""Pfeiffer adapter: the single adapter of AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247).

A(x) = U relu(D x + b_D) + b_U once a block, at the feed-forward part. In a post-norm block with o the feed-forward
output and h its residual: x = LN(o + h), block output LN(o + A(x) + h), so the block's own norm is used twice and the
adapter reads the normalised sum. In a pre-norm block y = o + A(o). D, U ~ N(0, 0.02), biases zero; norms stay frozen.
As in the authors' library (adapter-hub/adapters, `seq_bn`).
Use it as the lighter half of Houlsby's: nearly the same quality at half the cost.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Method, Placed
from ...core.operators.bottleneck import ACTIVATIONS, NormBottleneck, SeriesBottleneck
from ...core.part import Shared
from ...core.places import at_module, blocks_at, width_of
from ...core.registry import method
from ...model.anatomy import Anatomy


@method("pfeiffer", paper="2005.00247", family="modules")
class Pfeiffer(Method):
    """One bottleneck a block; trains `2 d m + m + d` values, `m = d / reduction`."""

    mergeable = False
    exact_at_start = False
    default_lr = 1e-4

    reduction: int = fields.positive(16, "width of the model over that of the bottleneck")
    activation: str = fields.choice("relu", tuple(ACTIVATIONS), "non-linearity")
    on: Any = fields.sites("block", "which blocks: block for all, or any place in the ones meant")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        for block in blocks_at(base, self.on, self.slug):
            width = width_of(block, base, self.slug)
            size = max(1, width // self.reduction)
            if not block.pre_norm and block.mlp_norm is not None:
                part = NormBottleneck(width, size, self.activation, start="bert")
                yield Placed(at_module(block.mlp_norm, block, "mlp"), part, "adapter_mlp")
                continue
            path = block.mlp_out or block.ssm
            if path is not None:
                part = SeriesBottleneck(width, size, self.activation, start="bert")
                yield Placed(at_module(path, block, "mlp"), part, "adapter_mlp")
