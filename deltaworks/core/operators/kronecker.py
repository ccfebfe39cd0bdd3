"""Kronecker products: `kron(W1, W2)[i p + k, j q + l] = W1[i, j] W2[k, l]`, applied without being built."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from .recompute import recomputed
from .row_dropout import RowDropout


class Kronecker(RowDropout):
    """`dW = scale kron(W1, W2)`, either factor full or a product of two thin ones.

    On activations: with `X` the input as `i1 x i2`, the output is `W1 X W2^T`. Backward keeps the input alone.

    Args:
        w1: `o1 x i1`, or None with `w1_a` (`o1 x r`) and `w1_b` (`r x i1`).
        w2: `o2 x i2`, or None with `w2_a` (`o2 x r`) and `w2_b` (`r x i2`).
        scale: multiplies the product.
        row_dropout, module_dropout, rescale: see `RowDropout`.
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "row_dropout", "module_dropout", "rescale")
    lean = True

    def __init__(
        self,
        w1: Tensor | None = None,
        w2: Tensor | None = None,
        w1_a: Tensor | None = None,
        w1_b: Tensor | None = None,
        w2_a: Tensor | None = None,
        w2_b: Tensor | None = None,
        scale: float = 1.0,
        row_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rescale: bool = True,
    ) -> None:
        super().__init__()
        self.row_dropout, self.module_dropout, self.rescale = row_dropout, module_dropout, rescale
        for name, whole, left, right in (("w1", w1, w1_a, w1_b), ("w2", w2, w2_a, w2_b)):
            if (whole is None) == (left is None or right is None) or (left is None) != (right is None):
                raise ValueError(f"a Kronecker product needs {name} or both {name}_a and {name}_b")
        self.scale = scale
        given = {"w1": w1, "w2": w2, "w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b}
        for name, value in given.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value))

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in self._parameters.values() if tensor is not None]

    def _factors(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """W1 and W2 made of the tensors that `_tensors` lists."""
        names = [name for name, tensor in self._parameters.items() if tensor is not None]
        own = dict(zip(names, tensors, strict=True))
        first = own["w1"] if "w1" in own else own["w1_a"] @ own["w1_b"]
        return first, own["w2"] if "w2" in own else own["w2_a"] @ own["w2_b"]

    def factors(self) -> tuple[Tensor, Tensor]:
        """W1 (`o1 x i1`) and W2 (`o2 x i2`)."""
        return self._factors(*self._tensors())

    def dense(self) -> Tensor:
        first, second = self.factors()
        return self.scale * torch.kron(first.contiguous(), second.contiguous())

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        # Building the weight costs its gradient, tokens * out * in, which a frozen base does without.
        first, second = (factor.shape for factor in self.factors())
        return self.dropping() or 3 * _cost(first, second) < weight.fan_in * weight.fan_out

    def side(self, x: Tensor) -> Tensor:
        return self.thinned(recomputed(self._applied, x, *self._tensors()))

    def _applied(self, x: Tensor, *tensors: Tensor) -> Tensor:
        first, second = (factor.to(x.dtype) for factor in self._factors(*tensors))
        blocks = x.unflatten(-1, (first.shape[1], second.shape[1]))
        y = (first @ blocks) @ second.T if _first_first(first.shape, second.shape) else first @ (blocks @ second.T)
        return (y * self.scale if self.scale != 1 else y).flatten(-2)


def _first_first(first: torch.Size, second: torch.Size) -> bool:
    """Whether `(W1 X) W2^T` costs less than `W1 (X W2^T)`."""
    (o1, i1), (o2, i2) = first, second
    return o1 * i1 * i2 + o1 * i2 * o2 <= i1 * i2 * o2 + o1 * i1 * o2


def _cost(first: torch.Size, second: torch.Size) -> int:
    """Products a token, the cheaper way."""
    (o1, i1), (o2, i2) = first, second
    return min(o1 * i1 * i2 + o1 * i2 * o2, i1 * i2 * o2 + o1 * i1 * o2)
