"""Products of two factors, written as PEFT's `LORA`: whatever a method calls them and wherever they start."""

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
from .draft import Draft, number
from .targets import named, patterns


def fits(part: Part) -> bool:
    """Whether a part can be written as PEFT's LoRA."""
    if isinstance(part, PerExpert):
        return part.kind in ("LowRank", "Chain")
    return isinstance(part, Decomposed) or is_product(part)


def is_product(part: Part) -> bool:
    """Whether a part's change is its two factors and nothing beside them."""
    if not isinstance(part, Factored):
        return False
    return type(part).dense in (Factored.dense, LowRank.dense) and type(part).fold is Delta.fold


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
        "LORA",
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
