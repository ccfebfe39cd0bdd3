"""Ranks and alphas of a configuration: one of each, and patterns over module names for others."""

from __future__ import annotations

import re
from typing import Any

from .source import Source
from .targets import pattern_for


class Ranks:
    """What `r`, `rank_pattern`, the key for alpha and `alpha_pattern` say.

    Attributes:
        rank, alpha: the defaults.
        meant: the rank and the alpha of each path.
    """

    def __init__(self, source: Source, paths: list[str], alpha: str) -> None:
        self.rank, self.alpha = source.whole("r", 8), source.number(alpha, 8)
        self.ranks, self.alphas = source.patterns("rank_pattern", int), source.patterns("alpha_pattern", float)
        self.meant = {
            path: (pattern_for(self.ranks, path, self.rank), float(pattern_for(self.alphas, path, self.alpha)))
            for path in paths
        }

    def overrides(self) -> dict[str, dict[str, Any]]:
        """Both maps of patterns as one; by module where that would not give every module what it is meant to have."""
        merged: dict[str, dict[str, Any]] = {pattern: {"rank": value} for pattern, value in self.ranks.items()}
        for pattern, value in self.alphas.items():
            merged.setdefault(pattern, {})["alpha"] = float(value)
        for path, values in self.meant.items():
            found = pattern_for(merged, path, {})
            if (found.get("rank", self.rank), found.get("alpha", self.alpha)) != values:
                others = {path: own for path, own in self.meant.items() if own != (self.rank, self.alpha)}
                return {re.escape(path): {"rank": own[0], "alpha": own[1]} for path, own in others.items()}
        return merged

    def scaled(self, scales: dict[str, float], alpha: float) -> None:
        """Say the same by an alpha that is divided by the rank itself."""
        self.alpha, self.ranks, self.alphas = alpha, {}, {}
        self.meant = {path: (rank, scales[path] * rank) for path, (rank, _) in self.meant.items()}
