"""The order of an epoch, a pure function of seed and epoch: a resumed run sees the batches it would have seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def mixed(*parts: int) -> int:
    """One seed below 2**63 out of several numbers, well spread also for small neighbouring ones (SplitMix64)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """The indices 0..length-1 in the order in which `epoch` visits them."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(mixed(seed, epoch))).tolist()


class EpochSampler(Sampler[int]):
    """`epoch_order` as a sampler; `transformers.Trainer` and `accelerate` call its `set_epoch`.

    To resume in the middle of an epoch, skip the batches that were already trained on.
    """

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.length, self.seed, self.epoch))
