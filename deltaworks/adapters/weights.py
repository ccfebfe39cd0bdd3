"""The safetensors file: written by the library, read by a reader of our own.

The format is eight bytes of length, a JSON header, and raw values. Reading it here takes little more code than wrapping
someone else's errors, and lets every fault (sizes, overlaps, doubled names, values that are not finite) be one clear
line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .files import parse_object, refuse

HEADER_LIMIT = 100 << 20
"""Largest header, in bytes; the format's own limit."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ARCHIVES = {b"PK\x03\x04": "a zip archive, as torch.save writes it", b"\x1f\x8b": "a compressed file"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype's name, its shape, and where its values lie."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of a safetensors file, verified, without reading a value.

    Raises:
        ValueError: for anything that is not a whole, consistent safetensors file.
    """
    with file.open("rb") as stream:
        return _header(file, stream)


def read_tensors(file: Path, limit: int) -> dict[str, Tensor]:
    """All tensors of a safetensors file, each in memory of its own.

    Args:
        file: the file.
        limit: bytes of values that are read at most.

    Raises:
        ValueError: for a damaged file, for one that is too large, and for values that are not finite.
    """
    with file.open("rb") as stream:
        entries = _header(file, stream)
        if (size := max((entry.end for entry in entries.values()), default=0)) > limit:
            refuse(file, f"has {size:,} bytes of values; an adapter of this model can have {limit:,}")
        start = stream.tell()
        tensors = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            stream.seek(start + entry.begin)
            tensors[name] = _values(file, name, entry, stream)
    return {name: tensors[name] for name in entries}


def _header(file: Path, stream: BufferedReader) -> dict[str, Entry]:
    size = os.fstat(stream.fileno()).st_size
    first = stream.read(8)
    if not first:
        refuse(file, "is empty")
    archive = next((what for magic, what in _ARCHIVES.items() if first.startswith(magic)), None)
    if archive is None and first[0] == 0x80 and 2 <= first[1] <= 5:
        archive = "a pickle"
    length = int.from_bytes(first, "little")
    if archive and length > min(HEADER_LIMIT, size):
        refuse(file, f"is {archive}, which can run code when it is opened, not a safetensors file")
    if len(first) < 8 or length > size - 8:
        refuse(file, f"is cut off: it has {size:,} bytes, its header alone claims {length:,}")
    if length > HEADER_LIMIT:
        refuse(file, f"has a header of {length:,} bytes; at most {HEADER_LIMIT:,} are read")
    header = parse_object(file, stream.read(length))
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        refuse(file, "has metadata that is not text")
    entries = {name: _entry(file, name, value) for name, value in header.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            refuse(file, f"{'overlaps' if entry.begin < at else 'leaves a gap'} before the tensor {name!r}")
        at = entry.end
    if at != size - 8 - length:
        reason = "is cut off" if at > size - 8 - length else "has bytes after the last tensor"
        refuse(file, f"{reason}: the header describes {at:,} bytes of values, the file has {size - 8 - length:,}")
    return entries


def _entry(file: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        refuse(file, f"the header's entry {name!r} does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(file, f"the tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape) or len(shape) > 8:
        refuse(file, f"the tensor {name!r} has no possible shape: {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        refuse(file, f"the tensor {name!r} has no possible place: {offsets!r}")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        refuse(file, f"the tensor {name!r} of shape {shape} and dtype {dtype} cannot take {end - begin} bytes")
    return Entry(dtype, tuple(shape), begin, end)


def _values(file: Path, name: str, entry: Entry, stream: BufferedReader) -> Tensor:
    dtype = DTYPES[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    raw = bytearray(entry.end - entry.begin)
    if stream.readinto(raw) != len(raw):
        refuse(file, f"is cut off within the tensor {name!r}")
    if dtype == torch.bool and (torch.frombuffer(raw, dtype=torch.uint8) > 1).any():
        refuse(file, f"the tensor {name!r} holds values that are neither true nor false")
    values = torch.frombuffer(raw, dtype=dtype).reshape(entry.shape)
    if not is_finite(values):
        refuse(file, f"the tensor {name!r} holds values that are not finite")
    return values


def write_tensors(file: Path, tensors: dict[str, Tensor], *, finite: bool = True) -> None:
    """Write a safetensors file; the same tensors give the same bytes.

    Args:
        file: its name.
        tensors: by name.
        finite: whether values must be, as an adapter's.

    Raises:
        ValueError: for values that are not finite but must be, and for a dtype the format has no name for.
    """
    ready, seen = {}, set()
    for name, value in tensors.items():
        value = whole(value)
        if value.dtype not in NAMES:
            raise ValueError(f"{name} has dtype {value.dtype}, which cannot be saved; known are {', '.join(DTYPES)}")
        if finite and not is_finite(value):
            raise ValueError(f"{name} holds values that are not finite; the adapter is broken and was not saved")
        value = value.contiguous()
        shared = value.untyped_storage().data_ptr() in seen or value.untyped_storage().nbytes() != value.nbytes
        ready[name] = value.clone() if shared else value
        seen.add(value.untyped_storage().data_ptr())
    save_file(ready, file, metadata={"format": "pt"})


def whole(tensor: Tensor) -> Tensor:
    """A tensor's complete value on the CPU; a sharded one is gathered, which every process must take part in."""
    value = tensor.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()  # type: ignore[operator]
    return value.cpu()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or not a number: the extremes tell, in one pass, a tenth of `isfinite`'s time."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
