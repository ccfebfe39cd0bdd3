"""AdaLoRA: PEFT's `ADALORA`. Ranks that fell during training are masks in PEFT's `rank_pattern`.

The schedule of a finished run is no part of what it computes: read, it becomes hyper-parameters; written, it is PEFT's
shortest valid one.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.operators.triplet import Triplet
from ...core.part import Part
from ..reading import Plan
from .draft import Draft, number
from .lora import ELSEWHERE, HARMLESS
from .source import Source, refuse
from .targets import named

KIND = "ADALORA"
METHOD = "adalora"


def fits(part: Part) -> bool:
    """Whether a part is AdaLoRA's."""
    return isinstance(part, Triplet)


def read(source: Source) -> Plan:
    """An `ADALORA` folder as an adapter."""
    for key, why in ELSEWHERE.items():
        source.forbid(key, why)
    for key in ("use_dora", "use_rslora", "target_parameters", "alpha_pattern"):
        source.forbid(key, "AdaLoRA has no such form")
    for key in (*HARMLESS, "init_lora_weights", "fan_in_fan_out", "r", "total_step"):
        source.keys.pop(key, None)
    rank, target = source.whole("init_r", 12), source.whole("target_r", 8)
    alpha, dropout = source.number("lora_alpha", 8), source.number("lora_dropout", 0.0)
    kept = source.take("rank_pattern", None, dict) or {}
    targets = source.targets()
    method = source.made(
        "adalora",
        on=source.on,
        init_rank=rank,
        target_rank=target,
        alpha=alpha,
        dropout=dropout,
        t_init=source.number("tinit", 0),
        t_final=source.number("tfinal", 0),
        interval=source.whole("deltaT", 1),
        beta1=source.number("beta1", 0.85),
        beta2=source.number("beta2", 0.85),
        gamma=source.number("orth_reg_weight", 0.5),
    )
    for path in targets:
        mask = kept.pop(f"{path}.lora_E", kept.pop(f"{path}.lora_E.default", [True] * rank))
        if not isinstance(mask, list) or len(mask) != rank or not all(isinstance(bit, (bool, int)) for bit in mask):
            refuse(source.file, f"rank_pattern: {path} must have {rank} entries that are true or false")
        a, b, e = (source.tensor(f"{path}.lora_{name}") for name in "ABE")
        wanted = sum(map(bool, mask))
        if a.dim() != 2 or b.dim() != 2 or e.shape != (a.shape[0], 1) or not wanted == a.shape[0] == b.shape[1]:
            shapes = f"{list(a.shape)}, {list(e.shape)} and {list(b.shape)}"
            refuse(source.weights, f"{path} has triplets of {shapes}, where {source.file.name} says rank {wanted}")
        source.place(path, "weight", Triplet(b, e.flatten(), a, scale=alpha / (rank + 1e-5), dropout=dropout))
    if kept:
        refuse(source.file, f"rank_pattern names {next(iter(kept))!r}, which is not adapted")
    source.biases(targets, "lora_only")
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """An AdaLoRA adapter as an `ADALORA` configuration."""
    method: Any = draft.method
    ranks = {}
    for part in draft.parts:
        assert isinstance(part, Triplet)
        path = draft.layer(part, nn.Linear, Conv1D)
        if draft.method.at(path) is not draft.method:
            raise draft.refuse(f"overrides at {path}", "PEFT's AdaLoRA starts with one rank and scale for all layers")
        ranks[path] = part.l.shape[0]
        draft.put(f"{path}.lora_A", part.q)
        draft.put(f"{path}.lora_B", part.p)
        draft.put(f"{path}.lora_E", part.l.detach().unsqueeze(-1))
    start, targets = method.init_rank, list(ranks)
    masks = {f"{path}.lora_E": [i < rank for i in range(start)] for path, rank in ranks.items()}
    return draft.config(
        KIND,
        init_r=start,
        target_r=method.target_rank,
        lora_alpha=number(method.alpha),
        lora_dropout=method.dropout,
        target_modules=named(draft.model, targets),
        rank_pattern=masks if set(ranks.values()) != {start} else None,
        tinit=0,
        tfinal=0,
        total_step=1,
        deltaT=method.interval,
        beta1=method.beta1,
        beta2=method.beta2,
        orth_reg_weight=method.gamma,
        fan_in_fan_out=draft.conv1d(targets),
        init_lora_weights=True,
        bias=draft.biases(targets, "lora_only"),
        modules_to_save=draft.saved(),
    )
