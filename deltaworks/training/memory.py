"""How much memory a stretch of work takes at most."""

from __future__ import annotations

import contextlib
import sys
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
