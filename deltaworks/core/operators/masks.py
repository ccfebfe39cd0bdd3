"""Fixed random binary masks, made again from a seed and never stored."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

PATTERNS = ("equal", "nm")
Masks = tuple[int, float, str, int]
"""Copies, the share of the entries that each keeps, pattern and seed."""


def masks_of(name: str, shape: torch.Size, masks: Masks) -> Tensor:
    """The masks of one tensor, `copies x shape`, on the CPU.

    Args:
        name: the tensor's, which the seed is mixed with.
        shape: the tensor's.
        masks: pattern "equal" keeps exactly the share anywhere, "nm" keeps 2 of every 4 neighbours.

    Raises:
        ValueError: when a mask would keep nothing, or the entries are no multiple of four.
    """
    copies, density, pattern, seed = masks
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.stack([_drawn(shape, density, pattern, generator) for _ in range(copies)])


def _drawn(shape: torch.Size, density: float, pattern: str, generator: torch.Generator) -> Tensor:
    number = shape.numel()
    if pattern == "nm":
        if number % 4:
            raise ValueError(f"a mask of 2 in 4 needs a multiple of 4 entries, a tensor of {list(shape)} has {number}")
        order = torch.rand(number // 4, 4, generator=generator, device="cpu").argsort(dim=1)
        return (order < 2).view(shape)
    kept = int(number * density)
    if not kept:
        raise ValueError(f"a mask that keeps the share {density:g} of {number} entries keeps none; give a larger share")
    mask = torch.zeros(number, dtype=torch.bool, device="cpu")
    mask[torch.randperm(number, generator=generator, device="cpu")[:kept]] = True
    return mask.view(shape)
