"""Batches of few lengths, for processors that compile a product anew for every shape.

oneDNN does so for half-precision products on CPUs: tens of milliseconds and half a megabyte each, dozens of them for
every new length of a batch, and it remembers only the last 1024. On variable-length data that is most of a small
model's step. Multiples of 32, from 256 on eight lengths between a power of two and its double, are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

STEP = 32


def stepped(length: int) -> int:
    """The least of the lengths 32, 64, ..., 512, 576, ..., 1024, 1152, ... that is not below `length`."""
    step = max((1 << (length - 1).bit_length()) // 16, STEP)
    return -(-length // step) * step


def longest(*splits: Dataset | None) -> int:
    """Tokens in the longest sequence; a row is one, or several where it says their `lengths`."""
    kernels: Any = pc  # whose functions are made at import
    found = []
    for split in filter(None, splits):
        several = "lengths" in split.column_names
        column = split.data.column("lengths" if several else "input_ids")
        found.append(kernels.max(kernels.list_flatten(column) if several else kernels.list_value_length(column)))
    return max(one.as_py() for one in found)


def costs(split: Dataset) -> list[int] | None:
    """Tokens that a batch of each row alone has, padding and targets among them; None for rows without tokens."""
    columns = [name for name in ("input_ids", "labels", "lengths") if name in split.column_names]
    if "input_ids" not in columns:
        return None
    rows = split.select_columns(columns).with_format("arrow")[:]
    if "lengths" in columns:
        return [max(sizes) * len(sizes) for sizes in rows["lengths"].to_pylist()]
    kernels: Any = pc
    lists = [rows[name] for name in columns if hasattr(rows[name].type, "value_type")]
    return [sum(sizes) for sizes in zip(*(kernels.list_value_length(one).to_pylist() for one in lists), strict=True)]


class StepwiseCollator:
    """Pads a batch to the next of few lengths, but not above `bound`.

    - `collator`: one that pads `input_ids` and has the attribute `pad_to_multiple_of`.
    - `bound`: the longest sequence of the data, which the base must take anyway.
    """

    def __init__(self, collator: Callable[..., Any], bound: int):
        self.collator: Any = collator
        self.bound = bound

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        length = max(max(row.get("lengths") or [len(row["input_ids"])]) for row in rows)
        # A multiple that no sequence exceeds is the length itself.
        self.collator.pad_to_multiple_of = max(length, min(stepped(length), self.bound))
        return self.collator(rows)
