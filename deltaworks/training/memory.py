"""How much memory a stretch of work takes at most, and what becomes of memory that it frees."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory since it was made, in bytes.

    On a GPU the most that tensors held there; elsewhere the largest resident size of the process, less what was
    resident at the beginning. Where Linux allows it the mark is set back, so that earlier peaks do not count.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.start = _resident("VmRSS") or _highest()
        self.forget()

    def forget(self) -> None:
        """Let only what comes from now on count as peak; what was resident at the beginning stays the same."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")

    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, (_resident("VmHWM") or _highest()) - self.start)


# Of glibc's mallopt, and the values that it comes to by itself.
_TRIM, _MMAP = -1, -3
_USUAL = {_MMAP: 32 << 20, _TRIM: 64 << 20}
_GENEROUS = {_MMAP: 1 << 30, _TRIM: 2**31 - 1}
_lock, _inside = threading.Lock(), 0


@contextlib.contextmanager
def keeping_freed(device: torch.device | str) -> Iterator[None]:
    """Let a process that trains on a CPU keep what it frees, until the end.

    A step frees what the next one needs again. By default the C library gives large pieces back to the system, which
    then has to clear them anew, page by page: up to a fifth of a step. `tune` and trainers that `wrap` makes do so; a
    loop of one's own can:

        with dw.training.keeping_freed("cpu"):
            for batch in batches: ...

    Another C library than glibc, and one that the environment sets up, are left as they are.

    Args:
        device: where the model is; anywhere but on a CPU nothing happens.
    """
    global _inside
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    ours = sys.platform == "linux" and torch.device(device).type == "cpu" and not told
    library = ctypes.CDLL(None) if ours else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    with _lock:
        _inside += 1
        if _inside == 1:
            _set(library, _GENEROUS)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _set(library, _USUAL)
                library.malloc_trim(0)


def _set(library: ctypes.CDLL, values: dict[int, int]) -> None:
    for option, value in values.items():
        if not library.mallopt(option, value):  # before 2.35 glibc takes no threshold above its usual one
            library.mallopt(option, _USUAL[option])


def _resident(entry: str) -> int | None:
    """A size of this process as Linux tells it, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(entry):
                return int(line.split()[1]) * 1024
    return None


def _highest() -> int:
    """The largest resident size this process ever had, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
