"""Low-rank factors of which only some entries train: the others are made again from a seed and never stored.

The trained entries are packed in one vector a factor, so gradients and optimizer state have its size.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .low_rank import Factored

GRAINS = ("element", "component", "matrix")


class PartialFactors(Factored):
    """`dW = scale * B A` with trained and fixed entries.

    A is Kaiming uniform and B zero at the start, drawn with the choice of entries from `seed`. With grain "matrix" one
    factor is fixed as a whole, by the throw of a coin; if that is B, it is B that is drawn and A that starts at zero.

    Args:
        fan_in, fan_out: the weight's.
        inner: rank of the factors.
        share: of the entries that train.
        grain: what is chosen: entries, rows of A and columns of B, or one factor.
        seed: of the choice and of A.
        scale: multiplies the product.
        dropout: probability of zeroing an input feature of the branch in training.
        a, b: the trained entries in the order of the flattened factors; None for the start (or for a fixed factor).
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_in", "fan_out", "inner", "share", "grain", "seed", "scale", "dropout")

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        inner: int,
        share: float,
        grain: str,
        seed: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        a: Tensor | None = None,
        b: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.fan_in, self.fan_out, self.inner = fan_in, fan_out, inner
        self.share, self.grain, self.seed = share, grain, seed
        self.scale, self.dropout = float(scale), float(dropout)
        generator = torch.Generator("cpu").manual_seed(seed)
        fixed = self.fixed_factor(grain, seed)
        given = {"a": a, "b": b}
        for name, shape in (("a", (inner, fan_in)), ("b", (fan_out, inner))):
            bound = 1 / math.sqrt(shape[1])
            drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 * bound - bound
            start = drawn if (name == "a") != (fixed == "b") else torch.zeros(shape, device="cpu")
            chosen = self._chosen(name, shape, generator) if grain != "matrix" else torch.arange(start.numel())
            if fixed == name:
                self.register_parameter(name, None)
                self.register_buffer(f"{name}_start", start, persistent=False)
                continue
            values = given[name]
            self.register_parameter(name, nn.Parameter(start.flatten()[chosen] if values is None else values))
            if grain != "matrix":
                self.register_buffer(f"{name}_index", chosen.int(), persistent=False)
                if name == "a":
                    self.register_buffer("a_start", start, persistent=False)
        self.train_a = fixed != "a"

    @staticmethod
    def fixed_factor(grain: str, seed: int) -> str | None:
        """The factor that is fixed as a whole."""
        return "ab"[seed % 2] if grain == "matrix" else None

    def _chosen(self, name: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Flat indices of the trained entries, ascending."""
        if self.grain == "element":
            number = shape[0] * shape[1]
            return torch.randperm(number, generator=generator)[: math.ceil(self.share * number)].sort().values
        lines = torch.randperm(self.inner, generator=generator)[: math.ceil(self.share * self.inner)]
        mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
        mask[lines if name == "a" else (slice(None), lines)] = True
        return mask.flatten().nonzero().squeeze(1)

    @property
    def rank(self) -> int:
        return self.inner

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._whole("a", (self.inner, self.fan_in)), self._whole("b", (self.fan_out, self.inner))

    def _whole(self, name: str, shape: tuple[int, int]) -> Tensor:
        trained, index = getattr(self, name), getattr(self, f"{name}_index", None)
        start = getattr(self, f"{name}_start", None)
        if trained is None:
            assert start is not None
            return start
        if index is None:
            return trained.view(shape)
        below = torch.zeros(shape, device=trained.device) if start is None else start
        return below.to(trained.dtype).flatten().scatter(0, index.long(), trained).view(shape)
