"""Processes for trials, made without importing anything heavy here: a Ray worker forks a trial off as a study does."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def context() -> Any:
    """How processes are made: forked off a server that has imported all, where the system can."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or os.uname().sysname == "Darwin":
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([f"{__package__}.preload"])
    return found


def ending(code: int | None) -> str:
    """What became of a process that gave no result."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"the process was ended by {name}" + (", as it is when memory runs out" if name == "SIGKILL" else "")
    return f"the process ended with status {code} and no result"


def on_ray(work: bytes) -> dict[str, Any]:
    """What a Ray worker does: runs a pickled `(trial, cache, key, threads)` in a process of its own, gives its row."""
    ours, theirs = context().Pipe()
    process = context().Process(target=_inside, args=(work, theirs))
    process.start()
    theirs.close()
    try:
        while (message := ours.recv())[0] != "row":
            pass
        row = message[1]
    except (EOFError, OSError):
        process.join()
        row = {"status": "failed", "error": ending(process.exitcode)}
    process.join()
    return row


def _inside(work: bytes, to: Connection) -> None:
    from .worker import work as run

    trial, cache, key, threads = pickle.loads(work)
    run(trial, Path(cache), key, to, threads, None)
