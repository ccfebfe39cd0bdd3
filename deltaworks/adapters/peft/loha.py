"""LoHa: PEFT's `LOHA`; convolutions as matrices, or with cores (`use_effective_conv2d`)."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from ...core.operators.hadamard import Hadamard, TuckerHadamard
from ...core.part import Part
from ...model.weights import CONVOLUTIONS, Weight
from ..reading import Plan
from .draft import Draft, number
from .ranks import Ranks
from .source import Source, refuse
from .targets import named, patterns

KIND = "LOHA"
FACTORS = {"a1": "hada_w1_a", "b1": "hada_w1_b", "a2": "hada_w2_a", "b2": "hada_w2_b"}
CORES = {"t1": "hada_t1", "t2": "hada_t2"}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def fits(part: Part) -> bool:
    """Whether a part is LoHa's."""
    return isinstance(part, (Hadamard, TuckerHadamard))


def read(source: Source) -> Plan:
    """A `LOHA` folder as an adapter."""
    source.flag("init_weights", True)
    tucker = source.flag("use_effective_conv2d")
    row, whole = source.number("rank_dropout", 0.0), source.number("module_dropout", 0.0)
    targets = source.targets()
    ranks = Ranks(source, targets, "alpha")
    settings = {"rank": ranks.rank, "alpha": ranks.alpha, "overrides": ranks.overrides()}
    method = source.made("loha", on=source.on, **settings, row_dropout=row, module_dropout=whole, tucker=tucker)
    for path in targets:
        weight, (rank, alpha) = source.weight(path, *LAYERS, any_convolution=True), ranks.meant[path]
        kernel = weight.fan_in // channels(weight)
        cores = tucker and kernel > 1
        sides = (weight.fan_out, channels(weight)) if cores else (weight.fan_out, weight.fan_in)
        shapes = {"a": (rank, sides[0]) if cores else (sides[0], rank), "b": (rank, sides[1])}
        factors = {own: source.shaped(f"{path}.{name}", *shapes[own[0]]) for own, name in FACTORS.items()}
        if not cores:
            source.place(path, "weight", Hadamard(**factors, scale=alpha / rank, row_dropout=row, module_dropout=whole))
            continue
        for own, name in CORES.items():
            core = source.tensor(f"{path}.{name}").flatten(2)
            if core.shape != (rank, rank, kernel):
                refuse(source.weights, f"{path}.{name} has {list(core.shape)} values, not {[rank, rank, kernel]}")
            factors[own] = core
        source.place(path, "weight", TuckerHadamard(**factors, scale=alpha / rank))
    return source.plan(method)


def channels(weight: Weight) -> int:
    """Input channels of a convolution (of one group), the width of what any other layer reads."""
    return weight.layer.weight.shape[1] if isinstance(weight.layer, CONVOLUTIONS) else weight.fan_in


def write(draft: Draft) -> dict[str, Any]:
    """An adapter of Hadamard products as a `LOHA` configuration."""
    ranks, alphas, cores, rows, wholes = {}, {}, [], [], []
    for part in draft.parts:
        assert isinstance(part, (Hadamard, TuckerHadamard))
        path = draft.layer(part, *LAYERS, any_convolution=True)
        layer: Any = draft.model.get_submodule(path)
        for own, name in FACTORS.items():
            draft.put(f"{path}.{name}", part.get_parameter(own))
        ranks[path] = rank = part.b1.shape[0]
        alphas[path] = number(part.scale * rank)
        if isinstance(layer, CONVOLUTIONS) and prod(layer.kernel_size) > 1:
            cores.append(isinstance(part, TuckerHadamard))
        if isinstance(part, TuckerHadamard):
            kernel = layer.kernel_size if len(layer.kernel_size) > 1 else (*layer.kernel_size, 1)
            for own, name in CORES.items():
                draft.put(f"{path}.{name}", part.get_parameter(own).unflatten(2, kernel))
        else:
            rows.append(part.row_dropout)
            wholes.append(part.module_dropout)
    (rank, own_ranks), (alpha, own_alphas) = patterns(ranks), patterns(alphas)
    return draft.config(
        KIND,
        r=rank,
        alpha=alpha,
        rank_pattern=own_ranks,
        alpha_pattern=own_alphas,
        rank_dropout=draft.one("row_dropout", rows or [0.0]),
        module_dropout=draft.one("module_dropout", wholes or [0.0]),
        use_effective_conv2d=draft.one("tucker", cores or [False]),
        init_weights=True,
        target_modules=named(draft.model, list(ranks)),
        modules_to_save=draft.saved(),
    )
