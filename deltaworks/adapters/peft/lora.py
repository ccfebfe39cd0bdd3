"""LoRA, DoRA and everything that is a product of two factors: PEFT's `LORA`.

Read: rank and alpha patterns, rsLoRA, DoRA, embeddings, convolutions, fused experts (`target_parameters`), a start from
PiSSA's or OLoRA's factors. Written: any part that has factors; a start that is subtracted becomes a LoRA of rank 2r.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.experts import PerExpert
from ...core.operators.decomposed import Decomposed
from ...core.operators.low_rank import Factored, LowRank
from ...core.part import Delta, Part
from ...model.weights import CONVOLUTIONS, Weight
from ..reading import Plan
from .draft import Draft, number
from .source import Source, refuse
from .targets import ends_with, modules, named, pattern_for, patterns

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


def fits(part: Part) -> bool:
    """Whether a part can be written as PEFT's LoRA."""
    if isinstance(part, PerExpert):
        return part.kind == "LowRank"
    return isinstance(part, (Factored, Decomposed))


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
    root = math.sqrt if rslora else float
    scales, sizes = {}, {}
    for path in (*targets, *(f"{owner}.{name}" for owner, name, _ in _parameters(source, parameters))):
        sizes[path] = pattern_for(ranks, path, rank)
        scales[path] = pattern_for(alphas, path, alpha) / root(sizes[path])
    for path in targets:
        _read_module(source, path, sizes[path], scales[path], dropout, dora, start)
    for owner, name, depth in _parameters(source, parameters):
        _read_parameter(source, owner, name, depth, sizes[f"{owner}.{name}"], scales[f"{owner}.{name}"])
    source.biases(targets, "lora_only")
    on = source.on if targets else parameters
    common = {"on": on, "rank": rank, "dropout": dropout}
    own = _overrides(
        ranks, alphas, {path: (sizes[path], scales[path] * root(sizes[path])) for path in sizes}, rank, alpha
    )
    if dora:
        own = (
            {p: {"rank": r, "alpha": scales[p] * r} for p, r in sizes.items() if (r, scales[p] * r) != (rank, alpha)}
            if rslora
            else own
        )
        return source.plan(source.made("dora", **common, alpha=alpha, overrides=own))
    if start == "pissa":
        del common["dropout"]
        return source.plan(source.made("pissa", **common, alpha=alpha * rank / root(rank), niter=None))
    return source.plan(source.made("lora", **common, alpha=alpha, rslora=rslora, overrides=own))


def _overrides(
    ranks: dict[str, int], alphas: dict[str, float], meant: dict[str, tuple[int, float]], rank: int, alpha: float
) -> dict[str, dict[str, Any]]:
    """Two maps of patterns as one; by module where patterns of the two maps meet at a module."""
    merged: dict[str, dict[str, Any]] = {pattern: {"rank": value} for pattern, value in ranks.items()}
    for pattern, value in alphas.items():
        merged.setdefault(pattern, {})["alpha"] = float(value)
    for path, (own_rank, own_alpha) in meant.items():
        found = pattern_for(merged, path, {})
        if (found.get("rank", rank), found.get("alpha", alpha)) != (own_rank, own_alpha) and (ranks and alphas):
            import re

            return {
                re.escape(p): {"rank": r, "alpha": float(a)} for p, (r, a) in meant.items() if (r, a) != (rank, alpha)
            }
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


@dataclass
class Factors:
    """What one module or parameter gets: factors with a leading axis for experts where there are any."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


def write(draft: Draft) -> dict[str, Any]:
    """An adapter of factored parts as a `LORA` configuration; its tensors go into the draft."""
    by_place: dict[tuple[str, str], list[Part]] = {}
    for part in draft.parts:
        by_place.setdefault((part.site.path, part.site.parameter or "weight"), []).append(part)
    found = {place: combined(draft, parts) for place, parts in by_place.items()}
    dora = {factors.magnitude is not None for factors in found.values()}
    if len(dora) > 1:
        raise draft.refuse("use_dora", "some layers have magnitudes and some have none")
    fused = {place for place in found if draft.model.get_submodule(place[0])._parameters[place[1]].dim() == 3}  # type: ignore[union-attr]
    fused -= {place for place in fused if isinstance(draft.model.get_submodule(place[0]), CONVOLUTIONS)}
    other = next((place for place in found if place[1] != "weight" and place not in fused), None)
    if other:
        raise draft.refuse(".".join(other), "target_parameters holds fused experts only")
    targets = [path for path, parameter in found if (path, parameter) not in fused]
    rslora = bool(getattr(draft.method, "rslora", False)) and all(_plain(parts) for parts in by_place.values())
    root = math.sqrt if rslora else float
    names = {place: place[0] if place not in fused else ".".join(place) for place in found}
    rank, rank_pattern = patterns({names[place]: factors.rank for place, factors in found.items()})
    alpha, alpha_pattern = patterns(
        {names[place]: _alpha(draft, place[0], factors, root) for place, factors in found.items()}
    )
    dropout = _dropout(draft, bool(fused))
    for (path, parameter), factors in found.items():
        _put(draft, path, parameter, factors, [name for place, name in fused if place == path])
    bias = draft.biases(targets, "lora_only")
    return draft.config(
        KIND,
        r=rank,
        lora_alpha=number(alpha),
        lora_dropout=dropout,
        target_modules=named(draft.model, targets) if targets else [],
        target_parameters=[names[place] for place in found if place in fused] or None,
        rank_pattern=rank_pattern,
        alpha_pattern={key: number(value) for key, value in alpha_pattern.items()},
        use_rslora=rslora,
        use_dora=dora == {True},
        bias=bias,
        modules_to_save=draft.saved(),
        fan_in_fan_out=draft.conv1d(targets),
        init_lora_weights=True,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _plain(parts: list[Part]) -> bool:
    return len(parts) == 1 and getattr(parts[0], "a0", None) is None


def _alpha(draft: Draft, path: str, factors: Factors, root: Any) -> float:
    """The alpha that PEFT divides back to our scale: the method's own where that is the one."""
    own = getattr(draft.method.at(path), "alpha", None)
    if own is not None and own / root(factors.rank) == factors.scale:
        return float(own)
    return factors.scale * root(factors.rank)


def _dropout(draft: Draft, fused: bool) -> float:
    layers = [part for part in draft.parts if not isinstance(part, PerExpert)]
    layers = [part for part in layers if not isinstance(draft.model.get_submodule(part.site.path), nn.Embedding)]
    rates = {float(getattr(part, "dropout", 0.0)) for part in layers}
    if fused:
        rates |= {float(part.inner.get("dropout", 0.0)) for part in draft.parts if isinstance(part, PerExpert)}
        if rates - {0.0}:
            warnings.warn("dropout is written as 0: PEFT has none where target_parameters adapts experts", stacklevel=5)
        return 0.0
    if len(rates) > 1:
        raise draft.refuse("dropout", f"PEFT has one for all layers, here are {sorted(rates)}")
    return rates.pop() if rates else 0.0


@torch.no_grad()
def combined(draft: Draft, parts: list[Part]) -> Factors:
    """The parts at one parameter as one pair of factors; parts of a fused layer fill their own rows."""
    every = [_factors(part) for part in parts]
    if len(every) == 1 and parts[0].site.rows is None:
        return every[0]
    if any(factors.magnitude is not None for factors in every):
        raise draft.refuse(parts[0].site.name, "magnitudes of parts of a fused layer are not the whole layer's")
    height = Weight(draft.model.get_submodule(parts[0].site.path), parts[0].site.parameter or "weight").fan_out
    one = len({factors.scale for factors in every}) == 1
    rows = []
    for part, factors in zip(parts, every, strict=True):
        b = factors.b if one else factors.b * factors.scale
        if part.site.rows is not None:
            index = torch.tensor(part.site.rows, device=b.device)
            b = b.new_zeros(*b.shape[:-2], height, b.shape[-1]).index_copy(-2, index, b)
        rows.append(b)
    a = torch.cat([factors.a for factors in every], dim=-2)
    # With one scale for all, keeping it would need alpha to grow with the summed rank; it does.
    return Factors(a, torch.cat(rows, dim=-1), every[0].scale if one else 1.0)


def _factors(part: Part) -> Factors:
    if isinstance(part, Decomposed):
        return Factors(part.a.detach(), part.b.detach(), part.scale, part.magnitude.detach())
    if isinstance(part, PerExpert):
        own = dict(part.named_parameters())
        a, b = own["a"].detach(), own["b"].detach()
        if "a0" in own:
            a, b = torch.cat([a, own["a0"].detach()], dim=-2), torch.cat([b, -own["b0"].detach()], dim=-1)
        return Factors(a, b, float(part.inner["scale"]))
    assert isinstance(part, Factored)
    a, b = part.factors()
    return Factors(a.detach(), b.detach(), part.scale)


def _put(draft: Draft, path: str, parameter: str, factors: Factors, wrapped: list[str]) -> None:
    layer, a, b = draft.model.get_submodule(path), factors.a, factors.b
    if a.dim() == 3:
        order = [name for name in layer._parameters if name in wrapped]
        inner = path + ".base_layer" * (len(order) - 1 - order.index(parameter))
        draft.put(f"{inner}.lora_A.weight", a.reshape(-1, a.shape[-1]))
        draft.put(f"{inner}.lora_B.weight", b.permute(1, 2, 0).reshape(b.shape[1], -1))
    elif isinstance(layer, nn.Embedding):
        draft.put(f"{path}.lora_embedding_A", a)
        draft.put(f"{path}.lora_embedding_B", b)
    elif isinstance(layer, CONVOLUTIONS):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise draft.refuse(
                path, "PEFT adapts convolutions in groups, or with padding other than zeros, differently"
            )
        ones = [1] * (layer.weight.dim() - 2)
        draft.put(f"{path}.lora_A.weight", a.reshape(a.shape[0], *layer.weight.shape[1:]))
        draft.put(f"{path}.lora_B.weight", b.reshape(*b.shape, *ones))
    else:
        draft.put(f"{path}.lora_A.weight", a)
        draft.put(f"{path}.lora_B.weight", b)
    if factors.magnitude is not None:
        spread = isinstance(layer, CONVOLUTIONS)
        shape = (1, -1, *[1] * (layer.weight.dim() - 2)) if spread else (-1,)  # type: ignore[operator, union-attr]
        draft.put(f"{path}.lora_magnitude_vector", factors.magnitude.reshape(shape))
