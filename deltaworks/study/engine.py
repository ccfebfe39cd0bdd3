"""The engine of all studies: runs trials side by side, each once, and never loses a study to one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from . import apart
from .rows import Row, failed, store, stored
from .trial import Trial
from .worker import work

Hear = Callable[[Trial, str, dict[str, Any]], "bool | None"]
"""Called as `hear(trial, event, figures)` with the events of `tune`; True stops the trial."""


def default_cache() -> Path:
    """Where rows are kept for all studies of this person: `trials` in $DELTAWORKS_CACHE or ~/.cache/deltaworks."""
    home = os.environ.get("DELTAWORKS_CACHE") or Path.home() / ".cache" / "deltaworks"
    return Path(home).expanduser() / "trials"


class Runner:
    """Runs trials.

        with Runner(jobs=2) as runner:
            for trial, row in runner.rows(trials):
                ...

    A row has `status` ("done", "failed", "stopped"), `error` (one line), `cached`, `key`, and what `work.perform`
    gives.
    Where processes are started anew instead of forked (Windows, macOS), the calling script needs the usual
    `if __name__ == "__main__":`.

    Args:
        cache: folder of rows that are known; `default_cache()` by default.
        jobs: trials side by side on this machine; each has its share of the threads, and one GPU where there are some.
        ray: address of a Ray cluster ("auto", "host:port", "ray://host:port", or "local" to start one here with `jobs`
            workers) whose nodes have Deltaworks installed and see the same files. Events are then not heard.
        threads: of each trial; by default the machine's divided by `jobs`, or as OMP_NUM_THREADS says.

    Raises:
        ImportError: Ray is asked for and not installed.
    """

    def __init__(
        self, cache: str | Path | None = None, jobs: int = 1, ray: str | None = None, threads: int | None = None
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs={jobs} is not allowed; it must be a whole number of at least 1")
        self.cache = Path(cache).expanduser() if cache is not None else default_cache()
        self.jobs, self.ray, self.threads = jobs, ray, threads
        if threads is None and "OMP_NUM_THREADS" not in os.environ:
            self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self._cluster = _Cluster(ray, jobs, self.threads) if ray is not None else None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the cluster."""
        if self._cluster is not None:
            self._cluster.close()

    def run(self, trials: Iterable[Trial], hear: Hear | None = None) -> list[Row]:
        """The rows of some trials, in their order."""
        trials = list(trials)
        found = {id(trial): row for trial, row in self.rows(trials, hear)}
        return [found[id(trial)] for trial in trials]

    def rows(self, trials: Iterable[Trial], hear: Hear | None = None) -> Iterator[tuple[Trial, Row]]:
        """Trials with their rows as they are known: those in the cache first, equal ones run once."""
        waiting: dict[str, list[Trial]] = {}
        for trial in trials:
            try:
                key = trial.key()
            except (ValueError, OSError, ImportError) as error:
                yield trial, failed(error) | {"key": None, "cached": False}
                continue
            row = stored(self.cache, key)
            if row is not None:
                yield trial, row | {"key": key, "cached": True}
            else:
                waiting.setdefault(key, []).append(trial)
        firsts = {key: alike[0] for key, alike in waiting.items()}
        if not firsts:
            return
        made = self._cluster.rows(firsts, self.cache) if self._cluster is not None else self._here(firsts, hear)
        for key, row in made:
            for trial in waiting[key]:
                yield trial, row | {"key": key, "cached": False}

    def _here(self, trials: dict[str, Trial], hear: Hear | None) -> Iterator[tuple[str, Row]]:
        """Rows by key, each trial in a process of its own."""
        context = apart.context()
        queue = list(trials.items())
        active: dict[Connection, _Active] = {}
        free = list(range(self.jobs))
        gpus = _gpus()
        try:
            while queue or active:
                while queue and free:
                    key, trial = queue.pop(0)
                    slot = free.pop(0)
                    ours, theirs = context.Pipe()
                    gpu = gpus[slot % len(gpus)] if len(gpus) > 1 else None
                    process = context.Process(
                        target=work, args=(trial, self.cache, key, theirs, self.threads, gpu), daemon=True
                    )
                    process.start()
                    theirs.close()
                    active[ours] = _Active(key, trial, process, slot)
                for connection in wait(list(active)):
                    assert isinstance(connection, Connection)
                    one = active[connection]
                    row = one.listen(connection, hear)
                    if row is None:
                        continue
                    connection.close()
                    one.process.join()
                    del active[connection]
                    free.append(one.slot)
                    yield one.key, row
        finally:
            for connection, one in active.items():
                one.process.terminate()
                one.process.join()
                connection.close()


class _Active:
    """A trial that is running."""

    def __init__(self, key: str, trial: Trial, process: Any, slot: int) -> None:
        self.key, self.trial, self.process, self.slot = key, trial, process, slot

    def listen(self, connection: Connection, hear: Hear | None) -> Row | None:
        """Take one message; the row when it has come, or when the process has ended without one."""
        try:
            message = connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return failed(apart.ending(self.process.exitcode))
        if message[0] == "row":
            return message[1]
        _, event, figures = message
        if hear is not None and hear(self.trial, event, figures):
            with contextlib.suppress(OSError):
                connection.send("stop")
        return None


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one]
    return [str(number) for number in range(torch.cuda.device_count())]


class _Cluster:
    """Trials on Ray."""

    def __init__(self, address: str, jobs: int, threads: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise ImportError("--ray needs a package that is not installed: pip install 'deltaworks[ray]'") from None
        self.ray, self.threads = ray, threads
        self.ours = not ray.is_initialized()
        if self.ours:
            given: dict[str, Any] = {"num_cpus": jobs, "include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **given)
            except ConnectionError as error:
                said = " ".join(str(error).split())
                raise ValueError(f"--ray {address}: no cluster answers there ({said})") from None

    def rows(self, trials: dict[str, Trial], cache: Path) -> Iterator[tuple[str, Row]]:
        ray = self.ray
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(apart.on_ray)
        pending = {}
        for key, trial in trials.items():
            work = pickle.dumps((dataclasses.replace(trial, labels={}), str(cache), key, self.threads))
            pending[remote.remote(work)] = key
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            for reference in ready:
                key = pending.pop(reference)
                try:
                    row = ray.get(reference)
                except ray.exceptions.RayError as error:
                    row = failed(f"on Ray: {str(error).strip().splitlines()[-1].strip()}")
                if row["status"] == "done" and stored(cache, key) is None:
                    store(cache, key, row)
                yield key, row

    def close(self) -> None:
        if self.ours:
            self.ray.shutdown()
