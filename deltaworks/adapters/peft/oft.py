"""OFT: PEFT's `OFT`, whose exact transform turns the other way, and which leashes COFT before a step, not after."""

from __future__ import annotations

import re
from typing import Any

from ...core.operators.rotation import BlockRotation, leash, strain
from ...core.part import Part
from ...methods.structured.oft import nearest_divisor
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse
from .targets import named, patterns

KIND = "OFT"


def fits(part: Part) -> bool:
    """Whether a part is OFT's."""
    return isinstance(part, BlockRotation)


def read(source: Source) -> Plan:
    """An `OFT` folder as an adapter."""
    count, side = source.take("r", 0, int), source.take("oft_block_size", 32, int)
    share, leashed, eps = source.flag("block_share"), source.flag("coft"), source.number("eps", 6e-5)
    series, terms = source.flag("use_cayley_neumann", True), source.whole("num_cayley_neumann_terms", 5)
    source.flag("fan_in_fan_out")
    source.flag("init_weights", True)
    if share:
        source.only_in_training("module_dropout")
    dropout = source.number("module_dropout", 0.0)
    if (side > 0) == (count > 0):
        refuse(source.file, f"r={count} and oft_block_size={side}: one of them must be above 0")
    held = max(terms, 4) if terms > 2 else terms  # PEFT's third term is the last of four
    targets, sides = source.targets(), {}
    for path in targets:
        width = source.weight(path).fan_in
        sides[path] = b = nearest_divisor(width, side) if side else width // nearest_divisor(width, count)
        k = source.shaped(f"{path}.oft_R.weight", 1 if share else width // b, b * (b - 1) // 2)
        part = BlockRotation(k if series else -k, b, width, held if series else None, dropout)
        if leashed:
            leash(part.k, eps)
        source.place(path, "weight", part)
    block, own = (side, {}) if side else patterns(sides)
    overrides = {re.escape(name): {"block": value} for name, value in own.items()}
    settings: dict[str, Any] = {"share": share, "dropout": dropout, "overrides": overrides}
    bound, kept = eps if leashed else None, held if series else None
    method = source.made("oft", on=source.on, block=block, terms=kept, eps=bound, **settings)
    source.biases(targets, "oft_only")
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """An adapter of block rotations as an `OFT` configuration."""
    terms, shared, parts = [], [], []
    for part in draft.parts:
        assert isinstance(part, BlockRotation)
        draft.put(f"{draft.layer(part)}.oft_R.weight", -part.k if part.terms is None else part.k)
        terms.append(part.terms)
        shared += [len(part.k) == 1] if part.width > part.block else []
        parts.append(part)
    # PEFT moves the side to a divisor of each layer's width, as we do; any side that leads to all of ours will do.
    wishes = [getattr(draft.method, "block", parts[0].block), *(part.block for part in parts)]
    wished = (side for side in wishes if all(nearest_divisor(part.width, side) == part.block for part in parts))
    block = next(wished, None)
    if block is None:
        raise draft.refuse("block", f"PEFT has one for all layers, here are {sorted({part.block for part in parts})}")
    held, eps = draft.one("terms", terms), getattr(draft.method, "eps", None)
    targets = [part.site.path for part in draft.parts]
    return draft.config(
        KIND,
        r=0,
        oft_block_size=block,
        block_share=draft.one("share", shared) if shared else False,
        use_cayley_neumann=held is not None,
        num_cayley_neumann_terms=held or 5,
        # PEFT would change what is not on its leash.
        coft=eps is not None and all(strain(part.k, eps).max() <= 1 + 1e-6 for part in parts),
        eps=eps or 6e-5,
        module_dropout=draft.one("dropout", (part.dropout for part in parts)),
        fan_in_fan_out=False,
        init_weights=True,
        target_modules=named(draft.model, targets),
        bias=draft.biases(targets, "oft_only"),
        modules_to_save=draft.saved(),
    )
