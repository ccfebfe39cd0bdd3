"""Searches of a few seconds, and of no time at all; imported by tests, so not a test module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from deltaworks.methods.modules.autopeft import AutoPEFT
from deltaworks.study.engine import Hear
from deltaworks.study.search_spec import Search
from deltaworks.study.trial import Trial

from .work import places

SMALL = {"steps": 4, "batch_size": 4, "device": "cpu", "samples": 0, "validation": 0.4, "lr": 1e-2}
METHODS = [{"method": "pfeiffer", "sizes": [16, 4]}, {"method": "lora", "sizes": [1, 4], "settings": {"on": "mlp"}}]


def wanted(folder: Path, **keys: Any) -> Search:
    """A search of a few seconds."""
    quick = {"methods": METHODS, "trials": 8, "startup": 4, "fidelity": 0.5, "full": 0, "prune_after": 0}
    return Search.of(places(folder), SMALL, quick, {"sampler": "random"}, keys)


def size_of(trial: Trial) -> float:
    """A number that grows with what a trial's recipe trains."""
    method = trial.recipe.made()
    methods = method.members if isinstance(method, AutoPEFT) else {trial.recipe.method: method}
    blocks = len(method.layers) if isinstance(method, AutoPEFT) and method.layers is not None else 2
    return blocks * sum(getattr(one, "rank", 0) + 16 / getattr(one, "reduction", 1e9) for one in methods.values())


class Played:
    """Stands for a runner: rows are made up, in no time, from what a trial would train."""

    jobs = 2

    def __init__(self, row: Callable[[Trial], dict[str, Any]] | None = None) -> None:
        self.given, self.trials = row, []

    def rows(self, trials: Iterable[Trial], hear: Hear | None = None) -> Iterator[tuple[Trial, dict[str, Any]]]:
        for trial in trials:
            self.trials.append(trial)
            size = size_of(trial)
            row = self.given(trial) if self.given else {}
            losses = row.pop("curve", [3.0 / (1 + size)])
            every = trial.recipe.evaluate_every or 1
            stopped = hear is not None and hear(trial, "adapter", {"trainable": int(100 * size)})
            for number, loss in enumerate(losses, 1):
                event = {"step": number * every, "figures": {"loss": loss}}
                stopped = stopped or bool(hear is not None and hear(trial, "evaluated", event))
                if stopped:
                    break
            done = {"status": "done", "error": None, "figures": {"loss": losses[-1]}, "kept": int(100 * size)}
            made = {"status": "stopped", "error": None} if stopped else done | row
            yield trial, made | {"cached": False, "key": None, "trainable": int(100 * size)}
