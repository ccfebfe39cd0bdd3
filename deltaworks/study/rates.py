"""A learning rate for each method, found in as many short runs for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

COARSE, FINE = 10.0, 10**0.5
"""Factors between rates: first to find the region, then within it."""


class Rates:
    """Asks for rates to try, one after the other, and tells the best.

    With rates given they are all tried. Otherwise it begins with the method's own and climbs: by factors of ten in the
    direction that helps, then by factors of the square root of ten beside the best, until `tries` are spent. Methods
    whose published rate is for far larger models are so not at a disadvantage, and every method has the same budget.

    Args:
        start: the method's own rate.
        tries: how many rates are tried.
        given: rates to try instead.
    """

    def __init__(self, start: float, tries: int, given: Sequence[float] = ()) -> None:
        self.start, self.given = start, [float(rate) for rate in given]
        self.tries = len(self.given) or tries
        self.known: dict[float, float] = {}

    def ask(self) -> float | None:
        """The next rate to try, None when there is none."""
        if len(self.known) >= self.tries:
            return None
        if self.given:
            return next(rate for rate in self.given if rate not in self.known)
        for factor in (COARSE, FINE):
            best = self.best()
            if best is None:
                # Nothing has worked yet: the rate is too high.
                return self._new(min(self.known, default=self.start * COARSE) / COARSE)
            for rate in (best * factor, best / factor):
                if self._new(rate) is not None:
                    return self._new(rate)
        return None

    def _new(self, rate: float) -> float | None:
        rate = float(f"{rate:.3g}")
        return None if any(math.isclose(rate, other, rel_tol=0.02) for other in self.known) else rate

    def tell(self, rate: float, cost: float | None) -> None:
        """What a rate led to, less is better; None for a run that failed."""
        self.known[rate] = math.inf if cost is None or math.isnan(cost) else cost

    def best(self) -> float | None:
        """The rate with the least cost, None while none has one."""
        finite = {rate: cost for rate, cost in self.known.items() if math.isfinite(cost)}
        return min(finite, key=lambda rate: (finite[rate], rate)) if finite else None
