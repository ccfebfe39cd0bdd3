"""Runs that kill themselves, each in a process of its own; imported by processes, so not a test module."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - imported once, for all processes
import trl.trainer.sft_trainer  # noqa: F401 - as above

from deltaworks import adapters, methods
from deltaworks.training import Recipe, checkpoint, tune

methods()  # imports all pages
gc.freeze()  # what is imported by now need not be searched in each process


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(recipe: dict[str, Any], resume: bool, moment: str) -> None:
    """Run a recipe and die at a moment: "step:3", "save:4" (in the middle of it), "rotate:4" (right after the
    checkpoint is in place), "adapter" (when it is written, but the run not finished), or "" for never."""
    torch.set_num_threads(1)
    kind, _, number = moment.partition(":")
    if kind == "save":
        save = torch.save

        def half(content: Any, path: Any) -> None:
            if f"checkpoint-{number}." in str(path) and Path(path).name == "optimizer.pt":
                Path(path).write_bytes(b"PK half of it")
                die()
            save(content, path)

        torch.save = half  # type: ignore[assignment]
    if kind == "rotate":
        rotate = checkpoint.rotate

        def dying(folder: Path, *rest: Any) -> None:
            if (folder / f"checkpoint-{number}").exists():
                die()
            rotate(folder, *rest)

        checkpoint.rotate = dying
    if kind == "adapter":
        written = adapters.save

        def last(*given: Any, **named: Any) -> Any:
            written(*given, **named)
            die()

        adapters.save = last  # type: ignore[assignment]

    def tell(event: str, **figures: Any) -> None:
        if event == kind == "step" and figures["step"] == int(number):
            die()
        if moment == "told" and event == "step":
            print(figures["step"], flush=True)

    tune(Recipe.of(recipe), resume=resume, progress=tell)
