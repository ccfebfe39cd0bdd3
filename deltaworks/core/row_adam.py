"""Adam whose every row has a count of steps of its own, can stand still, and can begin anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def fresh(factor: Tensor) -> State:
    """The state for a tensor of `... rows x width`: moments, one count of steps a row, steps each row yet rests."""
    rows = factor.shape[-2]
    counts = torch.zeros(rows, dtype=torch.int64)
    return {"m": torch.zeros_like(factor), "v": torch.zeros_like(factor), "step": counts, "still": [0] * rows}


def rest(state: State, row: int, steps: int) -> None:
    """Let a row stand still for some steps and begin anew after."""
    state["still"][row] = steps
    state["m"][..., row, :], state["v"][..., row, :], state["step"][row] = 0, 0, 0


def step(state: State, factor: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    """One step of AdamW in place, for the rows that do not rest.

    Args:
        state: made by `fresh`; may lie on another device.
        factor, gradient: `... rows x width`.
        group: the optimizer's settings: `lr`, and `betas`, `eps`, `weight_decay` where they are not the usual ones.
    """
    beta1, beta2 = group.get("betas", (0.9, 0.999))
    moves = torch.tensor([not steps for steps in state["still"]])
    state["step"] += moves
    state["still"] = [max(0, steps - 1) for steps in state["still"]]
    on = moves.to(factor.device).unsqueeze(-1)
    m, v = state["m"].to(factor), state["v"].to(factor)
    m.copy_(torch.where(on, beta1 * m + (1 - beta1) * gradient, m))
    v.copy_(torch.where(on, beta2 * v + (1 - beta2) * gradient.square(), v))
    state["m"], state["v"] = m, v
    count = state["step"].clamp(min=1).to(factor).unsqueeze(-1)
    update = (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + group.get("eps", 1e-8))
    decayed = factor * (1 - group["lr"] * group.get("weight_decay", 0.0))
    factor.copy_(torch.where(on, decayed - group["lr"] * update, factor))
