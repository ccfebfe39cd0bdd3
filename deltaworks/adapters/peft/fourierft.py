"""FourierFT: PEFT's `FOURIERFT`. The entries are the seed's in both libraries and stand in no PEFT file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...core.operators.spectral import Spectral
from ...core.part import Part
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse
from .targets import named, pattern_for, patterns

KIND = "FOURIERFT"
METHOD = "fourierft"


def fits(part: Part) -> bool:
    """Whether a part is FourierFT's."""
    return isinstance(part, Spectral)


def read(source: Source) -> Plan:
    """A `FOURIERFT` folder as an adapter."""
    n, scaling = source.whole("n_frequency", 1000), source.number("scaling", 150.0)
    seed = source.take("random_loc_seed", 777, int)
    own = source.patterns("n_frequency_pattern", int)
    zeros = source.flag("init_weights")
    source.flag("fan_in_fan_out")
    targets = source.targets()
    overrides = {pattern: {"n": value} for pattern, value in own.items()}
    start = "zeros" if zeros else "normal"
    method = source.made("fourierft", on=source.on, n=n, alpha=scaling, seed=seed, init=start, overrides=overrides)
    for path in targets:
        weight = source.weight(path, nn.Linear, Conv1D)
        count = pattern_for(own, path, n)
        c = source.tensor(f"{path}.fourierft_spectrum")
        if c.shape != (count,) or count > weight.fan_out * weight.fan_in:
            refuse(source.weights, f"{path} has {list(c.shape)} coefficients, where {source.file.name} says {count}")
        entries = drawn(weight.fan_out, weight.fan_in, seed)[:count].clone()
        source.place(path, "weight", Spectral(c, entries, weight.fan_out, weight.fan_in, scale=scaling))
    source.biases(targets, "fourier_only")
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """A FourierFT adapter as a `FOURIERFT` configuration."""
    counts = {}
    method: Any = draft.method
    for part in draft.parts:
        assert isinstance(part, Spectral)
        path = draft.layer(part, nn.Linear, Conv1D)
        counts[path] = part.c.shape[0]
        expected = drawn(part.fan_out, part.fan_in, method.seed)[: counts[path]]
        if not torch.equal(expected, part.entries.cpu().long()):
            raise draft.refuse(
                f"center={method.center} at {path}", "PEFT draws its entries without preference, from one seed"
            )
        draft.put(f"{path}.fourierft_spectrum", part.c)
    scaling = draft.one("alpha", (part.scale for part in draft.parts if isinstance(part, Spectral)))
    n, own = patterns(counts)
    targets = list(counts)
    return draft.config(
        KIND,
        n_frequency=n,
        n_frequency_pattern=own,
        scaling=scaling,
        random_loc_seed=method.seed,
        target_modules=named(draft.model, targets),
        fan_in_fan_out=draft.conv1d(targets),
        init_weights=method.init == "zeros",
        bias=draft.biases(targets, "fourier_only"),
        modules_to_save=draft.saved(),
    )


def drawn(fan_out: int, fan_in: int, seed: int) -> Tensor:
    """All entries of a grid in the order PEFT draws them."""
    return torch.randperm(fan_out * fan_in, generator=torch.Generator("cpu").manual_seed(seed))
