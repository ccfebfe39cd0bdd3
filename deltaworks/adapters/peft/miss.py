"""MiSS and its ancestor Bone-BAT: PEFT's `MISS` with `init_weights` true, "mini" or "bat"."""

from __future__ import annotations

from typing import Any

from ...core.operators.blocks import BlockAffine, Tiled
from ...core.part import Part
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse
from .targets import named

KIND = "MISS"


def fits(part: Part) -> bool:
    """Whether a part is MiSS's or Bone-BAT's."""
    return isinstance(part, (Tiled, BlockAffine))


def read(source: Source) -> Plan:
    """A `MISS` folder as an adapter."""
    rank, mini = source.whole("r", 64), source.whole("mini_r", 1)
    form, dropout = source.take("init_weights", True, bool, str), source.number("miss_dropout", 0.0)
    if form not in (True, False, "bat", "mini"):
        refuse(source.file, f"init_weights={form!r} is not known")
    targets = source.targets()
    if form == "bat":
        source.kind = "MISS with bat"
        method = source.made("bone_bat", on=source.on, rank=rank)
    else:
        method = source.made("miss", on=source.on, rank=rank, mini=mini if form == "mini" else None, dropout=dropout)
    for path in targets:
        weight = source.weight(path)
        if form == "bat":
            part: Part = BlockAffine(source.shaped(f"{path}.miss_block", weight.fan_out // rank, rank, rank))
        else:
            width = mini if form == "mini" else weight.fan_out
            if weight.fan_out % width:
                refuse(source.file, f"mini_r={mini} does not divide the {weight.fan_out} outputs of {path}")
            d = source.shaped(f"{path}.miss_block", rank, width)
            part = Tiled(d, weight.fan_out, weight.fan_in, dropout=dropout)
        source.place(path, "weight", part)
    source.biases(targets, "MiSS_only")
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """An adapter of MiSS's or Bone-BAT's parts as a `MISS` configuration."""
    forms, ranks, minis, dropouts = [], [], [], []
    for part in draft.parts:
        path = draft.layer(part)
        if isinstance(part, BlockAffine):
            if part.along != "in":
                raise draft.refuse(f"along={part.along!r}", "PEFT shares blocks along the input")
            form: bool | str = "bat"
        else:
            assert isinstance(part, Tiled)
            form = True if part.d.shape[1] == part.fan_out else "mini"
            minis += [part.d.shape[1]] if form == "mini" else []
            dropouts.append(part.dropout)
        forms.append(form)
        ranks.append(part.d.shape[-1] if form == "bat" else part.d.shape[0])
        draft.put(f"{path}.miss_block", part.d)
    targets = [part.site.path for part in draft.parts]
    return draft.config(
        KIND,
        r=draft.one("rank", ranks),
        mini_r=draft.one("mini", minis) if minis else 1,
        init_weights=draft.one("the form", forms),
        miss_dropout=draft.one("dropout", dropouts) if dropouts else 0.0,
        target_modules=named(draft.model, targets),
        bias=draft.biases(targets, "MiSS_only"),
        modules_to_save=draft.saved(),
    )
