"""What matters to the loss, smoothed over steps: entries of tensors, and whole changes of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from .part import Delta


class Sensitivity:
    """Running mean of what a tensor's entries score, and of how far each step's scores are from it.

    Args:
        beta1: smoothing of the score.
        beta2: smoothing of its deviation.

    Attributes:
        smoothed: by name, both, of the tensor's shape.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(self, name: str, score: Tensor) -> None:
        """Take in one step's scores."""
        mean, spread = self.smoothed.get(name, (torch.zeros_like(score), torch.zeros_like(score)))
        mean = mean.to(score) * self.beta1 + (1 - self.beta1) * score
        spread = spread.to(score) * self.beta2 + (1 - self.beta2) * (score - mean).abs()
        self.smoothed[name] = mean, spread

    def importance(self, name: str, tensor: Tensor) -> Tensor:
        """Smoothed score times its smoothed deviation, entry by entry of a tensor; zero where it was never observed."""
        if name not in self.smoothed:
            return torch.zeros_like(tensor)
        mean, spread = self.smoothed[name]
        return (mean * spread).to(tensor.device)


def lowest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The `count` entries of lowest score over all tensors, as masks of these; equal ones in the order of the tensors.

    Args:
        scores: by name, on any devices.
        count: of entries in all.
    """
    if not scores:
        return {}
    flat = torch.cat([score.flatten().cpu() for score in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(stable=True)[:count]] = True
    masks = chosen.split([score.numel() for score in scores.values()])
    return {name: mask.view_as(scores[name]).to(scores[name].device) for name, mask in zip(scores, masks, strict=True)}


class Importance:
    """Watches deltas (`Delta.watch`) while they are back-propagated through, and smooths what it hears.

    Args:
        beta1: smoothing of the importance.
        beta2: smoothing of its uncertainty, the distance of each step's importance from the smoothed one.

    Attributes:
        smoothed: by name, both.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed: dict[str, tuple[float, float]] = {}
        self._heard: dict[str, Tensor] = {}

    def watch(self, deltas: Mapping[str, Delta]) -> None:
        """Listen to the backward passes that follow, until `close`; several of one step add up."""
        self._heard = {}
        for name, delta in deltas.items():
            delta.watch = partial(self._hear, name)

    def _hear(self, name: str, change: Tensor, gradient: Tensor, entries: int) -> None:
        wide = torch.promote_types(change.dtype, torch.float32)
        score = (change.detach() * gradient.detach()).abs_().sum(dtype=wide) / math.sqrt(entries)
        self._heard[name] = self._heard[name] + score if name in self._heard else score

    def close(self, deltas: Mapping[str, Delta]) -> None:
        """Stop listening, and take what was heard into the smoothed figures.

        Raises:
            ValueError: when nothing was heard, as under torch.compile.
        """
        if not self._heard:
            raise ValueError("no gradient of a change was seen in this step; train without torch.compile")
        for name, delta in deltas.items():
            delta.watch = None
            mean, spread = self.smoothed.get(name, (0.0, 0.0))
            score = float(self._heard.get(name, 0.0))
            mean = self.beta1 * mean + (1 - self.beta1) * score
            self.smoothed[name] = mean, self.beta2 * spread + (1 - self.beta2) * abs(score - mean)

    def ranked(self) -> list[str]:
        """Names by importance times uncertainty, highest first; equal ones in the order of the deltas."""
        return sorted(self.smoothed, key=lambda name: -self.smoothed[name][0] * self.smoothed[name][1])
