"""Training a tiny model with a method, interrupted and continued as a checkpoint does it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.training import checkpoint
from tests.families import FAMILIES


def trained(
    method: Method, folder: Path, family: str = "llama", steps: int = 14, stop: int | None = None, lr: float = 1e-2
) -> tuple[dict[str, Tensor], dict[str, Any], dw.Tuned]:
    """The adapter's tensors, what its rules recorded, and its handle, after `steps`.

    Args:
        stop: after so many steps everything goes, and a new model takes up what the checkpoint kept.
    """

    def made() -> tuple[Any, Any, dw.Tuned, Any, Any]:
        torch.manual_seed(5)
        model, batch = FAMILIES[family]()
        tuned = dw.attach(model, method, seed=0, data=[batch] if method.needs_data else None)
        optimizer = torch.optim.AdamW(tuned.parameter_groups(lr))
        rules = tuned.run(steps, seed=3, optimizer=optimizer)
        rules.emit("attached")
        return model, batch, tuned, optimizer, rules

    model, batch, tuned, optimizer, rules = made()
    for step in range(steps):
        if step == stop:
            held = io.BytesIO()
            torch.save([checkpoint.optimizer_state(optimizer), rules.state_dict()], held)
            checkpoint.write_adapter(tuned, folder)
            model, batch, tuned, optimizer, rules = made()
            held.seek(0)
            kept = torch.load(held, weights_only=True)
            rules.load_state_dict(kept[1])
            checkpoint.read_adapter(tuned, folder)
            checkpoint.restore_optimizer(optimizer, kept[0])
        optimizer.zero_grad()
        rules.emit("step_begin")
        loss, penalty = model(**batch).loss, rules.penalty()
        (loss if penalty is None else loss + penalty).backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
    rules.emit("finished")
    return tuned.tensors(), rules.run.history, tuned
