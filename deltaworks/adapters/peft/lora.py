"""LoRA, DoRA and everything that is a product of two factors: PEFT's `LORA`.

Read: rank and alpha patterns, rsLoRA, DoRA, embeddings, convolutions, fused experts (`target_parameters`), and PiSSA's
exact start. `factors` writes: any part that has factors; a start that is subtracted becomes a LoRA of rank 2r.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ...core.experts import PerExpert
from ...core.operators.decomposed import Decomposed
from ...core.operators.low_rank import LowRank
from ...core.part import Delta
from ...model.weights import CONVOLUTIONS, Weight
from ..reading import Plan
from .factors import fits, write
from .source import Source, refuse
from .targets import ends_with, modules, pattern_for

__all__ = ["KIND", "fits", "read", "write"]
KIND = "LORA"
ELSEWHERE = {
    "lora_bias": "the factors have no bias here",
    "layer_replication": "layers are not repeated",
    "alora_invocation_tokens": "adapters act on every token",
    "use_qalora": "inputs are not pooled in groups",
    "use_bdlora": "factors are not block-diagonal",
    "velora_config": "activations are not compressed",
    "monteclora_config": "factors are not sampled",
    "kasa_config": "the base is not truncated",
    "arrow_config": "adapters are not routed",
    "trainable_token_indices": "single rows of an embedding are not trained",
}
HARMLESS = (
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "megatron_config",
    "qalora_group_size",
    "runtime_config",
)
STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def read(source: Source) -> Plan:
    """A `LORA` folder as an adapter."""
    for key, why in ELSEWHERE.items():
        source.forbid(key, why)
    rank, alpha, rslora = source.whole("r", 8), source.number("lora_alpha", 8), source.flag("use_rslora")
    dropout, dora = source.number("lora_dropout", 0.0), source.flag("use_dora")
    ranks, alphas = source.patterns("rank_pattern", int), source.patterns("alpha_pattern", float)
    start = source.take("init_lora_weights", True, bool, str)
    source.flag("fan_in_fan_out")  # says how the base stores its weight; the model says that itself
    for key in HARMLESS:
        source.keys.pop(key, None)
    parameters = source.names("target_parameters")
    if parameters and "target_modules" not in source.keys:
        source.keys["target_modules"] = []
    targets = source.targets()
    fused = _parameters(source, parameters)
    root = math.sqrt if rslora else float
    meant: dict[str, tuple[int, float]] = {}
    for path in (*targets, *(f"{owner}.{name}" for owner, name, _ in fused)):
        meant[path] = pattern_for(ranks, path, rank), float(pattern_for(alphas, path, alpha))
    scales = {path: own_alpha / root(own_rank) for path, (own_rank, own_alpha) in meant.items()}
    for path in targets:
        _read_module(source, path, meant[path][0], scales[path], dropout, dora, start)
    for owner, name, depth in fused:
        place = f"{owner}.{name}"
        _read_parameter(source, owner, name, depth, meant[place][0], scales[place])
    source.biases(targets, "lora_only")
    settings: dict[str, Any] = {"on": source.on if targets else parameters, "rank": rank}
    if dora or start == "pissa":
        if rslora:  # these methods divide alpha by the rank
            ranks, alphas, alpha = {}, {}, alpha * rank / root(rank)
            meant = {path: (own_rank, scales[path] * own_rank) for path, (own_rank, _) in meant.items()}
        settings |= {"dropout": dropout} if dora else {"niter": None}
    else:
        settings |= {"dropout": dropout, "rslora": rslora}
    settings |= {"alpha": alpha, "overrides": _overrides(ranks, alphas, meant, rank, alpha)}
    return source.plan(source.made("dora" if dora else "pissa" if start == "pissa" else "lora", **settings))


def _overrides(
    ranks: dict[str, int], alphas: dict[str, float], meant: dict[str, tuple[int, float]], rank: int, alpha: float
) -> dict[str, dict[str, Any]]:
    """Two maps of patterns as one; by module where that would not give every module what it is meant to have."""
    merged: dict[str, dict[str, Any]] = {pattern: {"rank": value} for pattern, value in ranks.items()}
    for pattern, value in alphas.items():
        merged.setdefault(pattern, {})["alpha"] = float(value)
    for path, values in meant.items():
        found = pattern_for(merged, path, {})
        if (found.get("rank", rank), found.get("alpha", alpha)) != values:
            others = {path: own for path, own in meant.items() if own != (rank, alpha)}
            return {re.escape(path): {"rank": own[0], "alpha": own[1]} for path, own in others.items()}
    return merged


def _read_module(
    source: Source, path: str, rank: int, scale: float, dropout: float, dora: bool, start: bool | str
) -> None:
    layer = source.model.get_submodule(path)
    if isinstance(layer, nn.Embedding):
        a, b, dropout = source.tensor(f"{path}.lora_embedding_A"), source.tensor(f"{path}.lora_embedding_B"), 0.0
    else:
        a, b = source.tensor(f"{path}.lora_A.weight"), source.tensor(f"{path}.lora_B.weight")
    if isinstance(layer, CONVOLUTIONS):
        if layer.groups != 1:
            refuse(
                source.file,
                f"target_modules: {path} is a convolution in {layer.groups} groups, which PEFT adapts otherwise",
            )
        a, b = a.flatten(1), b.flatten(1)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        refuse(
            source.weights,
            f"{path} has factors {list(a.shape)} and {list(b.shape)}, where {source.file.name} says rank {rank}",
        )
    if dora:
        magnitude = source.tensor(f"{path}.lora_magnitude_vector").flatten()
        if magnitude.shape != b.shape[:1]:
            refuse(source.weights, f"{path} has a magnitude of {magnitude.numel()} values for {b.shape[0]} outputs")
        return source.place(path, "weight", Decomposed(magnitude, a, b, scale=scale, dropout=dropout))
    a0, b0 = _start(source, Weight(layer, "weight", path=path), start, rank, scale)
    source.place(path, "weight", LowRank(a, b, scale=scale, dropout=dropout, a0=a0, b0=b0))


def _start(
    source: Source, weight: Weight, start: bool | str, rank: int, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """The product that the file expects to be taken out of the base, as factors; none for most files."""
    if start in STARTS:
        return None, None
    if start == "pissa":
        u, s, vh = torch.linalg.svd(weight.dense(), full_matrices=False)
        rootd = (s[:rank] / scale).sqrt()
        return rootd[:, None] * vh[:rank], u[:, :rank] * rootd
    refuse(
        source.file,
        f"init_lora_weights={start!r} expects a base that was changed by a start the file does not hold; save it with "
        "PEFT's path_initial_model_for_weight_conversion",
    )


def _parameters(source: Source, wanted: list[str]) -> list[tuple[str, str, int]]:
    """The parameters that `target_parameters` means: module, name, and how many wrappers stand around its own."""
    found: list[tuple[str, str, int]] = []
    for path, module in modules(source.model) if wanted else ():
        own = [name for name, value in module._parameters.items() if value is not None]
        mine = [name for name in own if ends_with(f"{path}.{name}", wanted)]
        found += [(path, name, len(mine) - 1 - place) for place, name in enumerate(mine)]
    if wanted and not found:
        refuse(source.file, f"target_parameters={wanted} names no parameter of {type(source.model).__name__}")
    return found


def _read_parameter(source: Source, path: str, parameter: str, depth: int, rank: int, scale: float) -> None:
    inner = path + ".base_layer" * depth
    a, b = source.tensor(f"{inner}.lora_A.weight"), source.tensor(f"{inner}.lora_B.weight")
    count = Weight(source.model.get_submodule(path), parameter).experts or 1
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank * count or b.shape[1] != rank * count:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        refuse(
            source.weights, f"{path}.{parameter} has factors {shapes}, where {count} experts of rank {rank} are meant"
        )
    a = a.reshape(count, rank, -1)
    b = b.reshape(b.shape[0], rank, count).permute(2, 0, 1).contiguous()
    each: list[Delta] = [LowRank(a[i].clone(), b[i].clone(), scale=scale) for i in range(count)]
    source.place(path, parameter, PerExpert(each) if count > 1 else each[0])
