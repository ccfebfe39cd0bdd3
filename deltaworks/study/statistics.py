"""What a few runs say about a method: means with intervals, and who beats whom on the same work."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALL_RESAMPLES = 50_000
"""Up to this many resamples every one is looked at, so that the interval of a few runs is exact."""
DRAWN, LEVEL = 10_000, 0.95
LOWER = ("loss", "perplexity", "mae", "rmse")
"""Figures of which less is better."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; both ends are the mean where there is but one value."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ({self.low:.4g} to {self.high:.4g})" if self.count > 1 else "")


def bootstrap(values: Sequence[float], level: float = LEVEL, seed: int = 0) -> Estimate:
    """The mean and the percentile bootstrap interval of it (Efron 1979).

    With few values all resamples are formed, with more `DRAWN` of them from a fixed seed: always the same result.

    Raises:
        ValueError: for no values.
    """
    found = np.asarray(values, dtype=float)
    if not len(found):
        raise ValueError("there is nothing to take the mean of")
    count = len(found)
    if count == 1:
        return Estimate(float(found[0]), float(found[0]), float(found[0]), 1)
    if count**count <= ALL_RESAMPLES:
        chosen = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(seed).integers(count, size=(DRAWN, count))
    means = found[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(found.mean()), float(low), float(high), count)


def lower_is_better(figure: str) -> bool:
    """Which way a figure of merit points."""
    return figure in LOWER


def better(one: float, other: float, lower: bool) -> float:
    """1 when the first is better, 0 when the second is, a half for equals."""
    if one == other:
        return 0.5
    return float((one < other) == lower)


def win_rate(ours: Mapping[object, float], theirs: Mapping[object, float], lower: bool) -> float | None:
    """The share of paired runs in which the first did better; ties count half. None where no run is paired.

    Args:
        ours, theirs: values by what pairs them: the same work, seed and so order of data.
        lower: whether less is better.
    """
    paired = [key for key in ours if key in theirs]
    if not paired:
        return None
    return sum(better(ours[key], theirs[key], lower) for key in paired) / len(paired)


def win_rates(values: Mapping[str, Mapping[object, float]], lower: bool) -> dict[str, dict[str, float]]:
    """Each against each: `rates[a][b]` is the share of paired runs in which `a` did better than `b`."""
    return {
        one: {
            other: rate
            for other in values
            if other != one and (rate := win_rate(values[one], values[other], lower)) is not None
        }
        for one in values
    }


def pareto(points: Mapping[str, tuple[float, float]], lower: bool) -> list[str]:
    """Names of the points (cost, figure) that no other beats in one without losing in the other, cheapest first."""
    front: list[str] = []
    best: float | None = None
    sign = 1 if lower else -1
    for name, (_, figure) in sorted(points.items(), key=lambda item: (item[1][0], sign * item[1][1])):
        if best is None or sign * figure < best:
            front.append(name)
            best = sign * figure
    return front
