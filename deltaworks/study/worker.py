"""The process of a trial: begins with clean memory, and takes nothing with it when it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .rows import Row, failed, store, stored
from .trial import Trial
from .work import perform

LOG = "log.txt"
"""In a trial's folder: what its run printed."""


class Stopped(Exception):
    """The study has seen enough of this trial."""


def row_of(trial: Trial, cache: Path, key: str, hear: Any = None) -> Row:
    """Run a trial, or wait for another process that is running the same, and give its row; a failure is a row, too.

    A run that was stopped goes on from its last checkpoint. What a `ValueError` says holds for the same recipe, data
    and code, and is kept like a result; any other failure is tried again the next time.
    """
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        found = stored(cache, key)
        if found is not None:
            return found

        def tell(event: str, **figures: Any) -> None:
            if hear is not None and hear(event, figures):
                raise Stopped

        try:
            row: Row = {"status": "done", "error": None} | perform(trial, folder / "run", tell)
        except Stopped:
            return {"status": "stopped", "error": None}
        except Exception as error:
            traceback.print_exc()
            row = failed(error)
            if not isinstance(error, ValueError):
                return row
        row = json.loads(json.dumps(row, default=str))
        store(cache, key, row)
        shutil.rmtree(folder / "run", ignore_errors=True)
        return row


def work(trial: Trial, cache: Path, key: str, to: Connection, threads: int | None, gpu: str | None) -> None:
    """What a forked process does: run the trial, send its events and its row, write what is printed into a file."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if threads is not None:
        torch.set_num_threads(threads)
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with (folder / LOG).open("a", encoding="utf-8") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

        def hear(event: str, figures: dict[str, Any]) -> bool:
            # A study that was killed has closed its end: sending raises, and the trial ends, too.
            to.send(("event", event, json.loads(json.dumps(figures, default=str))))
            return to.poll() and to.recv() == "stop"

        row = row_of(trial, cache, key, hear)
        with contextlib.suppress(OSError):
            to.send(("row", row))
