"""Resident memory and age of this process."""

from __future__ import annotations

import threading
import time

import psutil


def resident() -> int:
    """Bytes resident now."""
    return psutil.Process().memory_info().rss


def seconds_alive() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


class Resident(threading.Thread):
    """Watches the peak resident set from `start()` to `stop()`, looking every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, False

    def run(self) -> None:
        while not self.stopped:
            self.peak = max(self.peak, resident())
            time.sleep(0.002)

    def stop(self) -> int:
        """Stop watching; returns the peak in bytes."""
        self.stopped = True
        self.join()
        return max(self.peak, resident())
