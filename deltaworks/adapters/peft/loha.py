"""LoHa: PEFT's `LOHA`; convolutions as matrices, without `use_effective_conv2d`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.operators.hadamard import Hadamard
from ...core.part import Part
from ..reading import Plan
from .draft import Draft, number
from .ranks import Ranks
from .source import Source, refuse
from .targets import named, patterns

KIND = "LOHA"
FACTORS = {"a1": "hada_w1_a", "b1": "hada_w1_b", "a2": "hada_w2_a", "b2": "hada_w2_b"}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def fits(part: Part) -> bool:
    """Whether a part is LoHa's."""
    return isinstance(part, Hadamard)


def read(source: Source) -> Plan:
    """A `LOHA` folder as an adapter."""
    source.flag("init_weights", True)
    source.flag("use_effective_conv2d")
    source.only_in_training("rank_dropout", "module_dropout")
    targets = source.targets()
    ranks = Ranks(source, targets, "alpha")
    method = source.made("loha", on=source.on, rank=ranks.rank, alpha=ranks.alpha, overrides=ranks.overrides())
    for path in targets:
        weight, (rank, alpha) = source.weight(path, *LAYERS, any_convolution=True), ranks.meant[path]
        if source.has(f"{path}.hada_t1"):
            refuse(source.file, f"use_effective_conv2d: {path} has a core tensor, and LoHa here has matrices only")
        shapes = {"a": (weight.fan_out, rank), "b": (rank, weight.fan_in)}
        factors = {own: source.shaped(f"{path}.{name}", *shapes[own[0]]) for own, name in FACTORS.items()}
        source.place(path, "weight", Hadamard(**factors, scale=alpha / rank))
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """An adapter of Hadamard products as a `LOHA` configuration."""
    ranks, alphas = {}, {}
    for part in draft.parts:
        assert isinstance(part, Hadamard)
        path = draft.layer(part, *LAYERS, any_convolution=True)
        for own, name in FACTORS.items():
            draft.put(f"{path}.{name}", part.get_parameter(own))
        ranks[path] = rank = part.a1.shape[1]
        alphas[path] = number(part.scale * rank)
    (rank, own_ranks), (alpha, own_alphas) = patterns(ranks), patterns(alphas)
    return draft.config(
        KIND,
        r=rank,
        alpha=alpha,
        rank_pattern=own_ranks,
        alpha_pattern=own_alphas,
        rank_dropout=0.0,
        module_dropout=0.0,
        use_effective_conv2d=False,
        init_weights=True,
        target_modules=named(draft.model, list(ranks)),
        modules_to_save=draft.saved(),
    )
