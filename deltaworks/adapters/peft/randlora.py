"""RandLoRA: PEFT's `RANDLORA`. The bases are the seed's in both libraries; a file that holds others is refused."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.operators.random_bases import RandomBases, RandomMixture
from ...core.part import Part
from ..reading import Plan
from .draft import Draft, number
from .source import Source, refuse
from .targets import named

KIND = "RANDLORA"


def fits(part: Part) -> bool:
    """Whether a part is RandLoRA's."""
    return isinstance(part, RandomMixture)


def read(source: Source) -> Plan:
    """A `RANDLORA` folder as an adapter."""
    rank, seed = source.whole("r", 32), source.take("projection_prng_key", 0, int)
    alpha, dropout = source.number("randlora_alpha", 640), source.number("randlora_dropout", 0.0)
    sparse = {(False, False): "no", (True, False): "sparse"}.get(
        (source.flag("sparse"), source.flag("very_sparse")), "very"
    )
    for key in ("save_projection", "fan_in_fan_out", "init_weights"):
        source.flag(key, True)
    targets = source.targets()
    method = source.made("randlora", on=source.on, rank=rank, alpha=alpha, dropout=dropout, seed=seed, sparse=sparse)
    weights = {path: source.weight(path, nn.Linear, Conv1D) for path in targets}
    short, long = sorted((max(w.fan_in for w in weights.values()), max(w.fan_out for w in weights.values())))
    if rank > long:
        refuse(source.file, f"r={rank} is not allowed: no layer here is wide enough for it")
    bases = RandomBases(rank, short, long, seed, {"no": None, "sparse": 3.0, "very": math.sqrt(short)}[sparse])
    for path, weight in weights.items():
        for name, drawn in (("randlora_A", bases.a.unsqueeze(1)), ("randlora_B", bases.b)):
            for held in (f"{path}.{name}", name):
                if source.has(held) and not torch.equal(source.tensor(held).to(drawn), drawn):
                    why = f"are not those of projection_prng_key={seed}, and only seeded bases are kept"
                    refuse(source.weights, f"{held}: the bases {why}")
        smaller = min(weight.fan_in, weight.fan_out)
        count = -(-smaller // rank)
        lam = source.shaped(f"{path}.randlora_lambda", rank, count)
        gamma = source.shaped(f"{path}.randlora_gamma", count, smaller)
        sizes = weight.fan_out, weight.fan_in
        source.place(path, "weight", RandomMixture(lam, gamma, bases, *sizes, scale=alpha / rank, dropout=dropout))
    source.biases(targets, "randlora_only")
    return source.plan(method, {"bases": bases})


def write(draft: Draft) -> dict[str, Any]:
    """A RandLoRA adapter as a `RANDLORA` configuration; the bases are left to the seed."""
    bases = draft.shared["bases"]
    assert isinstance(bases, RandomBases)
    parts = [part for part in draft.parts if isinstance(part, RandomMixture)]
    for part in parts:
        path = draft.layer(part, nn.Linear, Conv1D)
        draft.put(f"{path}.randlora_lambda", part.lam)
        draft.put(f"{path}.randlora_gamma", part.gamma)
    targets = [part.site.path for part in parts]
    return draft.config(
        KIND,
        r=bases.rank,
        randlora_alpha=number(draft.one("alpha", (part.scale for part in parts)) * bases.rank),
        randlora_dropout=draft.one("dropout", (part.dropout for part in parts)),
        projection_prng_key=bases.seed,
        save_projection=False,
        sparse=bases.sparsity == 3.0,
        very_sparse=bases.sparsity not in (None, 3.0),
        fan_in_fan_out=draft.conv1d(targets),
        init_weights=True,
        target_modules=named(draft.model, targets),
        bias=draft.biases(targets, "randlora_only"),
        modules_to_save=draft.saved(),
    )
