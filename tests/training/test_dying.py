"""A run that is killed at any moment and resumed ends like the one that was not, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .dying import run

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"settings": {"rank": 2, "dropout": 0.2, "b_lr_ratio": 4.0}, "lr": 1e-2},
    "adalora": {"settings": {"init_rank": 3, "target_rank": 2, "dropout": 0.2}, "lr": 1e-2},
    "lisa": {"settings": {"layers": 1, "period": 3}, "lr": 1e-3},
    "increlora": {"settings": {"top": 2, "interval": 2, "dropout": 0.2, "warmup": 1}, "lr": 1e-2},
    "diffora": {"settings": {"rank": 2, "search": 5, "warmup": 1, "dropout": 0.2}, "lr": 1e-2},
}
# Processes are forked off one that has imported everything and computed nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.training.dying"])


def recipe(method: str, base: str, data: str, output: Path) -> dict[str, Any]:
    return {
        "base": base, "data": data, "method": method, "steps": 14, "batch_size": 2, "accumulation": 2, "save_every": 3,
        "evaluate_every": 4, "samples": 1, "sample_length": 4, "output": str(output), "device": "cpu",
        **METHODS[method],
    }  # fmt: skip


def lived(recipe: dict[str, Any], resume: bool, moment: str = "") -> bool:
    """Run in a process of its own; whether it was not killed."""
    process = PROCESSES.Process(target=run, args=(recipe, resume, moment))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the run failed instead of being killed"
    return process.exitcode == 0


def outcome(folder: Path) -> tuple[bytes, dict[str, Any]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    learned = {key: metrics[key] for key in ("losses", "before", "after", "evaluations", "samples", "history", "steps")}
    return (folder / "adapter" / "adapter.safetensors").read_bytes(), learned


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_is_resumed_to_the_same_adapter(
    method: str, tmp_path: Path, base: Callable[[str], str], data: Callable[[str], str]
) -> None:
    llama, completions = base("llama"), data("completions")
    assert lived(recipe(method, llama, completions, tmp_path / "whole"), resume=False)

    killed = recipe(method, llama, completions, tmp_path / "killed")
    draw = random.Random(method)
    moments = {f"step:{draw.randint(4, 5)}": 3, "save:6": 3, f"step:{draw.randint(7, 8)}": 6}
    if method == "lora":
        moments = {"step:2": 0} | moments | {"rotate:12": 12, "adapter": 14}
    for index, (moment, expected) in enumerate(moments.items()):
        assert not lived(killed, resume=index > 0, moment=moment), f"{moment} was not reached"
        whole = (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")
        newest = max((int(path.name.rpartition("-")[2]) for path in whole), default=0)
        assert newest == expected, "no half-written checkpoint counts"
        assert not (tmp_path / "killed" / "metrics.json").exists()
    assert lived(killed, resume=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "adapter", "metrics.json", "recipe.yaml", "report.html",
    ]  # fmt: skip


def test_a_run_killed_from_outside_is_resumed(
    tmp_path: Path, base: Callable[[str], str], data: Callable[[str], str]
) -> None:
    llama, completions = base("llama"), data("completions")
    whole, killed = (recipe("lora", llama, completions, tmp_path / name) for name in ("whole", "killed"))
    assert lived(whole, resume=False)
    for attempt, moment in enumerate((0.02, 0.1, 0.3)):
        process = PROCESSES.Process(target=run, args=(killed, attempt > 0, ""))
        process.start()
        while process.is_alive() and not (tmp_path / "killed" / "checkpoints").is_dir():
            time.sleep(0.005)
        time.sleep(moment)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert lived(killed, resume=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
