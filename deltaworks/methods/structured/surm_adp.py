"""SURM as an adapter: structured unrestricted-rank matrices (Sehanobish et al. 2024, arXiv:2406.17740).

h + f(M h) + bias after attention and after the feed-forward part, M (`d x d`) circulant, Circ(b * a), a product of two
symmetric Toeplitz matrices, T(b) T(a), of low displacement rank p, sum_t Circ(b_t) Skew(a_t), or (alpha / r) kron(B,
A); a ~ N(0, 0.02^2) (A Kaiming uniform), b = 0 and bias = 0: exact at the start. (The authors' Toeplitz adapter takes T
of the elementwise product by default; here it is the paper's product of matrices. Their script for GLUE has our rate,
a weight decay of 0.25 and a dropout of 0.15.)
Use it where bottleneck adapters are wanted at a twelfth of their size; it cannot be merged.
"""

import math
from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Method, Placed
from ...core.operators.bottleneck import ACTIVATIONS
from ...core.operators.structured_adapter import STRUCTURES, StructuredAdapter
from ...core.part import Shared
from ...core.places import at_module, blocks_at, width_of
from ...core.registry import method
from ...model.anatomy import Anatomy
from .surm import SURM


@method("surm_adp", paper="2406.17740", family="structured")
class SURMAdapter(Method):
    """Structured adapters after each sub-layer; each trains `2 p d + d` values (circulant, Toeplitz: p = 1)."""

    mergeable = False
    default_lr = 2e-3
    only = SURM.only

    structure: str = fields.choice("circulant", STRUCTURES, "kind of matrix")
    activation: str = fields.choice("gelu", tuple(ACTIVATIONS), "non-linearity f; identity for the authors' linear")
    pairs: int = fields.positive(1, "p, displacement rank; ldr only")
    rank: int = fields.positive(8, "r, side of the Kronecker factors, reduced to a divisor of d; kronecker only")
    scale: float = fields.number(1.0, "factor of M; not for kronecker", above=0)
    alpha: float = fields.number(16.0, "numerator of alpha / r; kronecker only", above=0)
    dropout: float = fields.fraction(0.0, "probability of dropping a feature of h on the added path")
    on: Any = fields.sites("block", "which blocks: block for all, or any place in the ones meant")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        found = False
        for block in blocks_at(base, self.on, self.slug):
            places = {"attention": block.attention_out, "mlp": block.mlp_out}
            if not any(places.values()):
                places = {"ssm": block.ssm}
            for role, path in places.items():
                if path is not None:
                    found = True
                    part = self._part(width_of(block, base, self.slug))
                    yield Placed(at_module(path, block, role), part, f"adapter_{role}")
        if not found:
            raise ValueError(f"surm_adp: the blocks of {type(base.model).__name__} have no sub-layer to sit at")

    def _part(self, width: int) -> StructuredAdapter:
        size, scale = self.pairs, self.scale
        if self.structure == "kronecker":
            size = math.gcd(width, self.rank)
            scale = self.alpha / size
        return StructuredAdapter(width, self.structure, self.activation, size, scale, self.dropout)
