"""How fast a machine is, for predictions of time by the roofline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch

from .shapes import Effort


@dataclass(frozen=True)
class Machine:
    """How fast a machine is.

    Attributes:
        flops: floating point operations a second, in products of matrices.
        bandwidth: bytes a second, in copies.
        call: seconds of the smallest operator.
    """

    flops: float
    bandwidth: float
    call: float

    def seconds(self, effort: Effort) -> float:
        """The roofline's time."""
        return effort.seconds(self.flops, self.bandwidth, self.call)


@cache
def gauge(device: str, dtype: torch.dtype) -> Machine:
    """Measure a machine: the best of a few products and copies, a tenth of a second in all."""
    size, words = (4096, 1 << 27) if device == "cuda" else (512, 1 << 22)
    left = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones(words, device=device)
    target, small = torch.empty_like(source), torch.ones(8, device=device)
    return Machine(
        flops=2 * size**3 / _best(lambda: left @ left, device),
        bandwidth=2 * source.nbytes / _best(lambda: target.copy_(source), device),
        call=_best(lambda: [small.add(1) for _ in range(100)], device) / 100,
    )


def _best(work: Callable[[], Any], device: str, times: int = 5) -> float:
    least = math.inf
    for _ in range(times):
        begin = perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        least = min(least, perf_counter() - begin)
    return max(least, 1e-9)
