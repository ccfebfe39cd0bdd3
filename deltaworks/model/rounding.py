"""What quantisation will make of a matrix: stored and read again, without a model being quantised."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .anatomy import Anatomy
from .loading import quantisation


def rounding(kind: str, base: Anatomy) -> Callable[[Tensor], Tensor]:
    """A function of a matrix, `out x in`, to its values once `load_base(..., quantize=kind)` has stored them.

    Args:
        kind: "nf4", "int8" or "int4".
        base: of the model that is to be quantised; the widths of its layers decide int4's groups.

    Raises:
        ValueError, ImportError: as `quantisation`.
    """
    config = quantisation(kind, base)
    if kind == "nf4":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        def through(matrix: Tensor) -> Tensor:
            packed, state = quantize_4bit(
                matrix.contiguous(),
                blocksize=64,
                quant_type=config.bnb_4bit_quant_type,
                compress_statistics=config.bnb_4bit_use_double_quant,
            )
            return dequantize_4bit(packed, state).to(matrix.dtype)

        return through
    from torchao.quantization import quantize_

    def stored(matrix: Tensor) -> Tensor:
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(matrix.clone(), requires_grad=False)
        quantize_(layer, config.quant_type)
        return layer.weight.dequantize().to(matrix.dtype)  # type: ignore[operator]

    return stored
