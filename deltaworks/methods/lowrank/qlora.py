"""QLoRA: efficient finetuning of quantized LLMs (Dettmers et al. 2023, arXiv:2305.14314).

W' = dequant(W_nf4) + s B A  at every linear layer of the blocks,  s = alpha / rank,  A Kaiming uniform, B = 0.
The adapter is LoRA; what the paper adds is the base, held in 4-bit NormalFloat with doubly quantised constants. That is
a matter of loading: `deltaworks tune --quantize nf4`, or `quantize="nf4"`, and its paged optimizer one of training,
`--optimizer paged_adamw`. Other pages work beside such a base too.
This one is the paper's recipe (rank 64, alpha 16, dropout 0.1, all linear layers, lr 2e-4) and warns when the base it
is put on is not quantised, since then it is LoRA and saves no memory.
Use it when the base does not fit in 16 bit.
"""

import warnings
from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.method import Placed, weight_at
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy
from .lora import LoRA


@method("qlora", paper="2305.14314", family="lowrank")
class QLoRA(LoRA):
    """LoRA with QLoRA's settings, for a base loaded in 4 bits; trains `rank * (in + out)` values a layer."""

    default_lr = 2e-4

    rank: int = fields.positive(64, "inner dimension r")
    dropout: float = fields.fraction(0.1, "probability of dropping an input feature of the branch; 0.05 from 33B on")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        placed = list(super().parts(base, shared, measured))
        if not any(weight_at(base.model, item.site).quantised for item in placed):
            warnings.warn(
                "qlora on a base that is not quantised is lora of a high rank; load the base with --quantize nf4 "
                '(quantize="nf4") to save its memory',
                stacklevel=2,
            )
        yield from placed
