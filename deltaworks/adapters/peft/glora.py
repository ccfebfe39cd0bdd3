"""GLoRA without a search: PEFT's `GLORA`, which has one kind for A and B, one for D and E, and makes no bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.operators.general import BIAS_TERMS, WEIGHT_TERMS, BiasTerms, Terms, WeightTerms
from ...core.part import Part
from ...model.weights import Weight
from ..reading import Plan
from .draft import Draft
from .source import Source
from .targets import named

KIND = "GLORA"
TERMS = {"a": "config_A_B", "b": "config_A_B", "c": "config_C", "d": "config_D_E", "e": "config_D_E"}


def fits(part: Part) -> bool:
    """Whether a part is GLoRA's."""
    return isinstance(part, Terms)


def read(source: Source) -> Plan:
    """A `GLORA` folder as an adapter."""
    rank = source.whole("r", 8)
    starts = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}
    said = {key: source.take(key, default, str) for key, default in starts.items()}
    source.flag("init_weights", True)
    kinds = {term: said[key] for term, key in TERMS.items()}
    targets = source.targets()
    method = source.made("glora", on=source.on, rank=rank, **kinds)
    for path in targets:
        weight, tensors = source.weight(path), dict[str, Tensor]()
        for term, kind in kinds.items():
            # PEFT writes zeros where a term is none, and where there is no bias to change.
            source.tensors.pop(f"{path}.glora_{term.upper()}.zeros", None)
            if term in "ab" or weight.bias() is not None:
                for own, (theirs, shape) in stored(weight, term, kind, rank).items():
                    value = source.shaped(f"{path}.{theirs}", *shape)
                    tensors[own] = value if own[1] == "u" else value.reshape(len(value), -1)
        terms = {term: kinds[term] for term in BIAS_TERMS}
        held = {name: value for name, value in tensors.items() if name[0] in terms}
        if held:
            source.place(path, "bias", BiasTerms(weight.fan_out, terms, **held))  # type: ignore[arg-type]
        terms = {term: kinds[term] for term in WEIGHT_TERMS}
        held = {name: value for name, value in tensors.items() if name[0] in terms}
        if held:
            source.place(path, "weight", WeightTerms(terms, **held))  # type: ignore[arg-type]
    source.biases(targets, "glora_only")
    return source.plan(method)


def stored(weight: Weight, term: str, kind: str, rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a term of some kind: our name -> PEFT's name within the layer, and its shape there."""
    rows = weight.fan_in if term == "c" else weight.fan_out
    name = f"glora_{term.upper()}"
    if kind == "lora":
        columns = weight.fan_in if term in "ab" else 1
        return {f"{term}d": (f"{name}.Xd", (rows, rank)), f"{term}u": (f"{name}.Xu", (rank, columns))}
    shapes = {"constant": (1,), "vector": (rows,) if term in "de" else (rows, 1)}
    return {f"{term}d": (f"{name}.X", shapes[kind])} if kind in shapes else {}


def write(draft: Draft) -> dict[str, Any]:
    """A GLoRA adapter as a `GLORA` configuration; a term without its partner is written as zeros."""
    held: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, list[str]] = {key: [] for key in TERMS.values()}
    for part in draft.parts:
        assert isinstance(part, Terms)
        path, layer = part.site.path, draft.model.get_submodule(part.site.path)
        if part.searching:
            raise draft.refuse("supernet=True", "PEFT has no search; search first")
        if part.site.rows is not None or not isinstance(layer, nn.Linear):
            raise draft.refuse(part.site.name, "PEFT adapts whole linear layers")
        if part.site.parameter == "bias" and layer.bias is None:
            raise draft.refuse(f"the bias of {path}", "the base has none, and PEFT makes none")
        held.setdefault(path, {}).update(part.named_parameters())
        for term, kind in part.kinds.items():
            kinds[TERMS[term]] += [kind] if kind != "none" else []
    said = {key: draft.one(key, found or ["none"]) for key, found in kinds.items()}
    ranks = [value.shape[0] for tensors in held.values() for name, value in tensors.items() if name[1] == "u"]
    rank = draft.one("rank", ranks or [1])
    for path, tensors in held.items():
        weight = Weight(draft.model.get_submodule(path), path=path)
        for term, key in TERMS.items():
            for own, (theirs, shape) in stored(weight, term, said[key], rank).items():
                value = tensors[own].reshape(shape) if own in tensors else torch.zeros(shape, dtype=torch.float32)
                if term in "ab" or weight.bias() is not None:
                    draft.put(f"{path}.{theirs}", value)
    targets = list(held)
    return draft.config(
        KIND,
        r=rank,
        **said,
        init_weights=True,
        target_modules=named(draft.model, targets),
        bias=draft.biases(targets, "glora_only"),
        modules_to_save=draft.saved(),
    )
