"""VeRA: PEFT's `VERA`. The random pair is the seed's in both libraries; a file that holds another pair is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.operators.scaled import RandomPair, ScaledRandom
from ...core.part import Part
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse
from .targets import named

KIND = "VERA"
METHOD = "vera"


def fits(part: Part) -> bool:
    """Whether a part is VeRA's."""
    return isinstance(part, ScaledRandom)


def read(source: Source) -> Plan:
    """A `VERA` folder as an adapter."""
    rank, seed = source.whole("r", 256), source.take("projection_prng_key", 0, int)
    dropout, start = source.number("vera_dropout", 0.0), source.number("d_initial", 0.1)
    source.flag("save_projection", True)
    source.flag("fan_in_fan_out")
    source.flag("init_weights", True)
    targets = source.targets()
    method = source.made("vera", on=source.on, rank=rank, d_initial=start, dropout=dropout, seed=seed)
    weights = {path: source.weight(path, nn.Linear, Conv1D) for path in targets}
    widest = max(weight.fan_in for weight in weights.values()), max(weight.fan_out for weight in weights.values())
    if rank * sum(widest) > 1 << 30:
        refuse(source.file, f"r={rank} is not allowed: no layer here is wide enough for it")
    pair = RandomPair(rank, *widest, seed)
    for name, drawn in (("vera_A", pair.a), ("vera_B", pair.b)):
        if source.has(name) and not torch.equal(source.tensor(name).to(drawn), drawn):
            refuse(
                source.weights, f"{name} is not the pair of projection_prng_key={seed}, and only seeded pairs are kept"
            )
    for path, weight in weights.items():
        d, b = source.shaped(f"{path}.vera_lambda_d", rank), source.shaped(f"{path}.vera_lambda_b", weight.fan_out)
        source.place(path, "weight", ScaledRandom(d, b, pair, fan_in=weight.fan_in, dropout=dropout))
    source.biases(targets, "vera_only")
    return source.plan(method, {"pair": pair})


def write(draft: Draft) -> dict[str, Any]:
    """A VeRA adapter as a `VERA` configuration."""
    pair = draft.shared["pair"]
    assert isinstance(pair, RandomPair)
    for part in draft.parts:
        assert isinstance(part, ScaledRandom)
        path = draft.layer(part, nn.Linear, Conv1D)
        if part.lambda_d.shape[0] != pair.rank:
            raise draft.refuse(
                f"overrides, rank={part.lambda_d.shape[0]} at {path}", "PEFT has one rank for all layers"
            )
        draft.put(f"{path}.vera_lambda_d", part.lambda_d)
        draft.put(f"{path}.vera_lambda_b", part.lambda_b)
    targets = [part.site.path for part in draft.parts]
    draft.tensors["base_model.vera_A"], draft.tensors["base_model.vera_B"] = pair.a, pair.b
    method: Any = draft.method
    return draft.config(
        KIND,
        r=pair.rank,
        target_modules=named(draft.model, targets),
        projection_prng_key=pair.seed,
        save_projection=True,
        vera_dropout=method.dropout,
        d_initial=method.d_initial,
        fan_in_fan_out=draft.conv1d(targets),
        bias=draft.biases(targets, "vera_only"),
        modules_to_save=draft.saved(),
    )
