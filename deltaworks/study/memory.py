"""Memory as a machine has it and as a person writes it."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import torch

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# Where Linux says how much a container may take and takes.
LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def parse(text: str) -> int:
    """Bytes of a size as typed: `24GiB`, `24GB`, `24G` (both 10^9), `512MiB`, `1000000`.

    Raises:
        ValueError: when it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no size of memory; write 24GiB, 16GB or 800MiB")
    return int(float(found[1]) * UNITS[found[2]])


def shown(size: float) -> str:
    """A size in bytes as text with three digits or so."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            value = size / factor
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{size:.0f} B"


def free(device: torch.device | str) -> int | None:
    """Bytes that can be taken now: of a GPU's memory, else of the machine's or of its container's; None if unknown."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    if kind != "cpu":
        return None
    known = [size for size in (_available(), _allowed()) if size is not None]
    return min(known) if known else None


def _available() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS; Windows knows neither
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _allowed() -> int | None:
    for limit, used in LIMITS:
        with contextlib.suppress(OSError, ValueError):
            return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return None
