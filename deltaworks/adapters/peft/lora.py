"""LoRA, DoRA and everything that is a product of two factors: PEFT's `LORA`.

Read: rank and alpha patterns, rsLoRA, DoRA, embeddings, convolutions, fused experts (`target_parameters`), and the
exact starts of PiSSA and OLoRA. `factors` writes: any part that has factors; a start that is subtracted becomes a LoRA
of rank 2r.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...core.experts import PerExpert
from ...core.operators.decomposed import Decomposed
from ...core.operators.low_rank import LowRank
from ...core.part import Delta
from ...model.weights import CONVOLUTIONS, Weight
from ..reading import Plan
from .factors import fits, write
from .ranks import Ranks
from .source import Source, refuse
from .targets import ends_with, modules

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
"""`init_lora_weights` that leave the base as it is."""
ELSEWHENCE = {"pissa_niter": "random draws", "corda": "data", "lora_ga": "data", "loftq": "quantisation"}
"""Beginnings of those that change it by what cannot be found again, and where that came from."""


def read(source: Source) -> Plan:
    """A `LORA` folder as an adapter."""
    for key, why in ELSEWHERE.items():
        source.forbid(key, why)
    rslora, dropout, dora = source.flag("use_rslora"), source.number("lora_dropout", 0.0), source.flag("use_dora")
    start = source.take("init_lora_weights", True, bool, str)
    start = start.lower() if isinstance(start, str) else start
    source.flag("fan_in_fan_out")  # says how the base stores its weight; the model says that itself
    for key in HARMLESS:
        source.keys.pop(key, None)
    parameters = source.names("target_parameters")
    if parameters and start not in STARTS:
        refuse(source.file, f"init_lora_weights={start!r} with target_parameters is not known here")
    if parameters and "target_modules" not in source.keys:
        source.keys["target_modules"] = []
    targets = source.targets()
    fused = _parameters(source, parameters)
    root = math.sqrt if rslora else float
    ranks = Ranks(source, [*targets, *(f"{owner}.{name}" for owner, name, _ in fused)], "lora_alpha")
    scales = {path: own_alpha / root(own_rank) for path, (own_rank, own_alpha) in ranks.meant.items()}
    for path in targets:
        _read_module(source, path, ranks.meant[path][0], scales[path], dropout, dora, start)
    for owner, name, depth in fused:
        place = f"{owner}.{name}"
        _read_parameter(source, owner, name, depth, ranks.meant[place][0], scales[place])
    source.biases(targets, "lora_only")
    slug = "dora" if dora else str(start) if start in ("pissa", "olora") else "lora"
    settings: dict[str, Any] = {"on": source.on if targets else parameters}
    if slug != "lora" and rslora:  # these methods divide alpha by the rank
        ranks.scaled(scales, ranks.alpha * ranks.rank / root(ranks.rank))
    settings |= {"lora": {"dropout": dropout, "rslora": rslora}, "dora": {"dropout": dropout}}.get(slug, {})
    settings |= {"niter": None} if slug == "pissa" else {}
    made = source.made(slug, **settings, rank=ranks.rank, alpha=ranks.alpha, overrides=ranks.overrides())
    return source.plan(made)


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
        if start not in STARTS:
            refuse(source.file, f"init_lora_weights={start!r} with use_dora is not known here")
        magnitude = source.tensor(f"{path}.lora_magnitude_vector").flatten()
        if magnitude.shape != b.shape[:1]:
            refuse(source.weights, f"{path} has a magnitude of {magnitude.numel()} values for {b.shape[0]} outputs")
        return source.place(path, "weight", Decomposed(magnitude, a, b, scale=scale, dropout=dropout))
    dtype = torch.promote_types(a.dtype, torch.float32)
    a0, b0 = _start(source, Weight(layer, "weight", path=path), start, rank, scale, dtype)
    source.place(path, "weight", LowRank(a, b, scale=scale, dropout=dropout, a0=a0, b0=b0))


def _start(
    source: Source, weight: Weight, start: bool | str, rank: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The product that the file expects to be taken out of the base, as factors; none for most files.

    Found in float32, as PEFT does whatever the base's dtype; what PEFT rounds when it changes the base stays exact.
    """
    # Embeddings and convolutions it starts as plain LoRA, whatever is asked for, or fails.
    if start in STARTS or not isinstance(weight.layer, (nn.Linear, Conv1D)):
        return None, None
    whence = next((why for name, why in ELSEWHENCE.items() if str(start).startswith(name)), None)
    if whence is not None:
        way = "PEFT's path_initial_model_for_weight_conversion"
        if start == "loftq":  # which that cannot convert
            way = "the base it was trained on, and init_lora_weights=true"
        reason = f"expects a base that was changed by a start from {whence}, which the file does not hold"
        refuse(source.file, f"init_lora_weights={start!r} {reason}; save it with {way}")
    if start not in ("pissa", "olora"):
        refuse(source.file, f"init_lora_weights={start!r} is not known; it may expect a base that was changed")
    if weight.quantised:
        reason = f"init_lora_weights={start!r} starts from {weight.path}.weight, which is quantised"
        refuse(source.file, f"{reason}; load the base unquantised")
    dense = weight.dense().float()
    if start == "pissa":
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        return (root[:, None] * vh[:rank]).to(dtype), (u[:, :rank] * root).to(dtype)
    # PEFT decomposes a Conv1D's weight as it is stored, `in x out`, and takes that product out of it as it is.
    turned = isinstance(weight.layer, Conv1D)
    q, r = torch.linalg.qr(dense.T if turned else dense)
    a0, b0 = (q[:, :rank].T, r[:rank].T) if turned else (r[:rank], q[:, :rank])
    return a0.to(dtype).contiguous(), b0.to(dtype).contiguous()


def _parameters(source: Source, wanted: list[str]) -> list[tuple[str, str, int]]:
    """The parameters that `target_parameters` means: module, name, and how many wrappers stand around its own."""
    found: list[tuple[str, str, int]] = []
    names = frozenset(wanted)
    for path, module in modules(source.model) if wanted else ():
        own = [name for name, value in module._parameters.items() if value is not None]
        mine = [name for name in own if ends_with(f"{path}.{name}", names)]
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
