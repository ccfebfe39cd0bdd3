"""LoKr, and any Kronecker product whose sides PEFT splits the same way: PEFT's `LOKR`."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from ...core.operators.kronecker import Kronecker
from ...core.operators.tucker_kronecker import TuckerKronecker
from ...core.part import Part
from ...methods.structured.lokr import shapes
from ...model.weights import CONVOLUTIONS, Weight
from ..reading import Plan
from .draft import Draft, number
from .ranks import Ranks
from .source import Source, refuse
from .targets import named, patterns

KIND = "LOKR"
FACTORS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def fits(part: Part) -> bool:
    """Whether a part is a Kronecker product."""
    return isinstance(part, Kronecker)


def read(source: Source) -> Plan:
    """A `LOKR` folder as an adapter."""
    both, factor = source.flag("decompose_both"), source.take("decompose_factor", -1, int)
    start = source.take("init_weights", True, bool, str)
    if start not in (True, False, "lycoris"):
        refuse(source.file, f"init_weights={start!r} is not known")
    tucker = source.flag("use_effective_conv2d")
    dropouts = {
        "row_dropout": source.number("rank_dropout", 0.0),
        "module_dropout": source.number("module_dropout", 0.0),
        "rescale": source.flag("rank_dropout_scale"),
    }
    targets = source.targets()
    ranks = Ranks(source, targets, "alpha")
    init = "lycoris" if start == "lycoris" else "peft"
    settings = {"rank": ranks.rank, "alpha": ranks.alpha, "overrides": ranks.overrides()}
    method = source.made(
        "lokr", on=source.on, factor=factor, both=both, init=init, tucker=tucker, **settings, **dropouts
    )
    for path in targets:
        weight, (rank, alpha) = source.weight(path, *LAYERS, any_convolution=True), ranks.meant[path]
        factors = {}
        for name, shape in shapes(weight, rank, factor, both, tucker).items():
            value = source.tensor(f"{path}.lokr_{name}").flatten(len(shape) - 1)
            if tuple(value.shape) != shape:
                wanted = f"{list(value.shape)}, where {source.file.name} says {list(shape)}"
                refuse(source.weights, f"{path}.lokr_{name} has shape {wanted}")
            factors[name] = value
        kind = TuckerKronecker if "t2" in factors else Kronecker
        source.place(path, "weight", kind(**factors, scale=alpha / rank, **dropouts))
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """An adapter of Kronecker products as a `LOKR` configuration."""
    parts = {
        draft.layer(part, *LAYERS, any_convolution=True): part for part in draft.parts if isinstance(part, Kronecker)
    }
    both = any(part.w1_a is not None for part in parts.values())
    cores = [isinstance(part, TuckerKronecker) for path, part in parts.items() if _spread(draft, path, part)]
    tucker = draft.one("tucker", cores or [False])
    wishes = [getattr(draft.method, "factor", -1), -1]
    wishes += [side for part in parts.values() for side in part.factors()[0].shape]
    found: dict[str, int] = {}
    for factor in dict.fromkeys(wishes):
        found = {path: _rank(draft, path, part, factor, both, tucker) for path, part in parts.items()}
        if all(found.values()):
            break
    else:
        path = next(path for path, rank in found.items() if not rank)
        raise draft.refuse(f"the factors of {path}", "PEFT splits the sides otherwise")
    for path, part in parts.items():
        layer: Any = draft.model.get_submodule(path)
        for name in FACTORS:
            value = part._parameters.get(name)
            if value is None:
                continue
            if name == "w2" and isinstance(layer, CONVOLUTIONS):
                value = value.unflatten(1, (-1, *layer.kernel_size))
            elif name == "t2":
                value = value.unflatten(2, (*layer.kernel_size, 1)[:2])
            draft.put(f"{path}.lokr_{name}", value)
    alphas = {path: number(part.scale * found[path]) for path, part in parts.items()}
    (rank, own_ranks), (alpha, own_alphas) = patterns(found), patterns(alphas)
    return draft.config(
        KIND,
        r=rank,
        alpha=alpha,
        rank_pattern=own_ranks,
        alpha_pattern=own_alphas,
        decompose_both=both,
        decompose_factor=factor,
        rank_dropout=draft.one("row_dropout", (part.row_dropout for part in parts.values())),
        rank_dropout_scale=draft.one("rescale", (part.rescale for part in parts.values())),
        module_dropout=draft.one("module_dropout", (part.module_dropout for part in parts.values())),
        use_effective_conv2d=tucker,
        init_weights="lycoris" if getattr(draft.method, "init", "") == "lycoris" else True,
        target_modules=named(draft.model, list(parts)),
        modules_to_save=draft.saved(),
    )


def _spread(draft: Draft, path: str, part: Kronecker) -> bool:
    """Whether PEFT would give the second factor a core if it gave any."""
    layer: Any = draft.model.get_submodule(path)
    return part.w2_a is not None and isinstance(layer, CONVOLUTIONS) and prod(layer.kernel_size) > 1


def _rank(draft: Draft, path: str, part: Kronecker, factor: int, both: bool, tucker: bool) -> int:
    """A rank with which PEFT makes matrices of these shapes for this layer, 0 if there is none."""
    held = {name: tuple(value.shape) for name, value in part.named_parameters()}
    thin = [shape[0] for name, shape in held.items() if name.endswith("b")]
    own = getattr(draft.method.at(path), "rank", None)
    tries = [thin[0]] if thin else [own or 1, max(max(shape) for shape in held.values())]
    weight = Weight(draft.model.get_submodule(path), path=path)
    return next((rank for rank in tries if shapes(weight, rank, factor, both, tucker) == held), 0)
