"""KronA_B: Kronecker adapter beside the feed-forward part (Edalati et al. 2022, arXiv:2212.10650).

ffn'(x) = ffn(x) + s kron(A, B) x  (+ s_res x: KronA_B_res),  x what the feed-forward part itself reads,  A: a1 x a2 ~
Kaiming uniform, B = 0 and s_res = 0: exact at the start. The sides nearest to square, one smaller first and one larger
first, make A and B of one size, the fewest values there can be. There is no public code; in a pre-norm block x is
taken as the normalised stream, as for other parallel adapters, and s_res starts at zero.
Use it where KronA's merged form is not needed: one branch a block, beside all of its feed-forward part.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Method, Placed
from ...core.operators.bottleneck import Tap, Tape
from ...core.operators.kronecker_branch import ParallelKronecker, TappedKronecker
from ...core.part import Shared
from ...core.places import at_module, blocks_at, ends, width_of
from ...core.registry import method
from ...model.anatomy import Anatomy
from .lokr import split


@method("krona_b", paper="2212.10650", family="structured")
class KronAB(Method):
    """A Kronecker product beside the feed-forward part; trains `a1 a2 + b1 b2` values a block, one more with s_res."""

    mergeable = False

    scale: float = fields.number(1.0, "factor s of the product; 1 to 16 in the paper", above=0)
    residual: bool = fields.flag(False, "add x itself, times a trained number")
    rows: int | None = fields.whole(None, "a1, a divisor of the width; none for its smaller side", low=1, optional=True)
    columns: int | None = fields.whole(
        None, "a2, a divisor of the width; none for its larger side", low=1, optional=True
    )
    on: Any = fields.sites("block", "which blocks: block for all, or any place in the ones meant")

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        return {"tape": Tape()}

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        tape = shared["tape"]
        assert isinstance(tape, Tape)
        for block in blocks_at(base, self.on, self.slug):
            first, last = ends(block, "mlp")
            if first is None or last is None:
                continue
            sizes = self.sizes(width_of(block, base, self.slug), block.path)
            settings: dict[str, Any] = sizes | {"scale": self.scale, "residual": self.residual}
            if first == last:
                yield Placed(at_module(first, block, "mlp"), ParallelKronecker(**settings), "branch")
                continue
            yield Placed(at_module(first, block, "mlp"), Tap(block.index, tape), "tap")
            part = TappedKronecker(**settings, place=block.index, tape=tape)
            yield Placed(at_module(last, block, "mlp"), part, "branch")

    def sizes(self, width: int, place: str) -> dict[str, int]:
        """Width and sides of A.

        Raises:
            ValueError: when a side that was asked for does not divide the width.
        """
        small, large = split(width, -1)
        found = {"rows": self.rows or small, "columns": self.columns or large}
        for name, side in found.items():
            if width % side:
                raise ValueError(
                    f"krona_b: {name}={side} does not divide the {width} of {place}; take a divisor, or none"
                )
        return {"width": width, **found}
