"""Prefixes of keys and values: PEFT's `PREFIX_TUNING`, one table for all layers of a decoder.

In PEFT the text begins at the position after the prefix, so only adapters with `positions="shifted"` can be written.
Of an encoder-decoder PEFT prefixes the decoder's self-attention, and hands its table out four tensors a layer, although
it holds two: layer `l` of `L` reads pair `2 l mod L`, some pairs are read twice and others never. So it is read here.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ...core.operators.prefix import EncodedPrefix, PrefixKV, ShiftedPositions
from ...core.part import Part
from ...model.anatomy import Anatomy, Block
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse

KIND = "PREFIX_TUNING"


def fits(part: Part) -> bool:
    """Whether a part belongs to a prefix."""
    return isinstance(part, (PrefixKV, EncodedPrefix, ShiftedPositions))


def _layers(base: Anatomy) -> list[Block]:
    """The blocks whose self-attention PEFT gives a prefix: those of the stack that makes the output."""
    name = "decoder" if base.is_encoder_decoder else base.stacks[0].name
    return [block for block in base.blocks if block.stack == name and block.attention is not None]


def _pair(base: Anatomy, layer: int, layers: int) -> int:
    """Which pair of the table a layer reads."""
    return 2 * layer % layers if base.is_encoder_decoder and layers > 1 else layer


def read(source: Source) -> Plan:
    """A `PREFIX_TUNING` folder as an adapter."""
    for key in ("encoder_hidden_size", "prefix_projection", "init_weights", "num_transformer_submodules"):
        source.keys.pop(key, None)
    length, heads, layers = (
        source.whole(key, 0) for key in ("num_virtual_tokens", "num_attention_heads", "num_layers")
    )
    width = source.whole("token_dim", 0)
    table = source.tensor("prompt_embeddings")
    blocks = _layers(source.base)
    if len(blocks) != layers:
        refuse(source.file, f"num_layers={layers}: {type(source.model).__name__} has {len(blocks)} layers")
    if tuple(table.shape) != (length, layers * 2 * width) or width % heads:
        refuse(source.weights, f"prompt_embeddings has shape {list(table.shape)}, not {[length, layers * 2 * width]}")
    on = [f"^{re.escape(str(block.attention))}$" for block in blocks] if source.base.is_encoder_decoder else "all"
    method = source.made("prefix_tuning", length=length, hidden=None, positions="shifted", on=on)
    with torch.random.fork_rng(devices=[]):
        placed = list(method.parts(source.base, {}, None))
    # Layer after layer, keys before values: `length x (layers, 2, heads, size)`.
    tables = table.reshape(length, layers, 2, heads, width // heads).permute(1, 2, 3, 0, 4)
    prefixes = {item.site.path: item.part for item in placed if isinstance(item.part, PrefixKV)}
    for number, block in enumerate(blocks):
        key, value = tables[_pair(source.base, number, layers)]
        part = prefixes[str(block.attention)]
        if part.key.shape != key.shape:
            refuse(
                source.weights,
                f"{block.attention} takes keys of {list(part.key.shape)}, the file has {list(key.shape)}",
            )
        part.key, part.value = (torch.nn.Parameter(own.contiguous()) for own in (key, value))
    source.placed += placed
    return source.plan(method)


@torch.no_grad()
def write(draft: Draft) -> dict[str, Any]:
    """A prefix as a `PREFIX_TUNING` configuration."""
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    for part in draft.parts:
        if isinstance(part, EncodedPrefix):
            tables[part.site.path] = part.table()
        elif isinstance(part, PrefixKV):
            tables[part.site.path] = part.key, part.value
    layers = [str(block.attention) for block in _layers(draft.base)]
    if set(tables) != set(layers):
        raise draft.refuse("on", "PEFT gives every layer's self-attention of one decoder a prefix, and no others")
    if not any(isinstance(part, ShiftedPositions) for part in draft.parts):
        raise draft.refuse("positions='text'", "with PEFT the text begins after the prefix; take positions='shifted'")
    heads, length, size = tables[layers[0]][0].shape
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for number, path in enumerate(layers):
        own = pairs.setdefault(_pair(draft.base, number, len(layers)), tables[path])
        if not all(torch.equal(one, other) for one, other in zip(own, tables[path], strict=True)):
            raise draft.refuse(f"the prefix of {path}", "PEFT gives this layer of the decoder that of an earlier one")
    unread = torch.zeros_like(tables[layers[0]][0])
    every = [table for number in range(len(layers)) for table in pairs.get(number, (unread, unread))]
    rows = [table.permute(1, 0, 2).reshape(length, -1) for table in every]
    draft.prefix = "base_model."
    draft.tensors["prompt_embeddings"] = torch.cat(rows, dim=1)
    task = draft.task(always=True)
    return draft.config(
        KIND,
        num_virtual_tokens=length,
        token_dim=heads * size,
        num_transformer_submodules=2 if draft.base.is_encoder_decoder else 1,
        num_attention_heads=heads,
        num_layers=len(layers),
        encoder_hidden_size=heads * size,
        prefix_projection=False,
        modules_to_save=draft.saved(),
    ) | {"task_type": task, "auto_mapping": None}
