"""What lies outside the blocks: embeddings, positions, heads, poolers, norms; and the stacks they belong to."""

from __future__ import annotations

import re

from torch import nn

from . import names
from .anatomy import FRESH, Anatomy, Block, Stack
from .evidence import Evidence, holds, integer
from .kinds import is_conv, is_embedding, is_linear, is_norm, own


def write_stack(seen: Evidence, container: str, name: str, blocks: list[Block]) -> Stack:
    """The stack whose blocks are the children of `container`."""
    norm = final_norm(seen, container, blocks)
    if norm:
        seen.norm_role[norm] = "norm.final"
    return Stack(
        name=name,
        path=container,
        blocks=tuple(block.index for block in blocks),
        embedding=input_embedding(seen, container),
        position=position_of(seen, container),
        final_norm=norm,
        causal=any(block.causal for block in blocks),
    )


def outside_norms(seen: Evidence) -> list[str]:
    return [path for path, module in seen.modules.items() if is_norm(module) and not seen.in_block(path)]


def final_norm(seen: Evidence, container: str, blocks: list[Block]) -> str | None:
    """The norm that reads the last block's output; without a trace, the last norm beside the blocks' container."""
    last = seen.trace.first(blocks[-1].path)
    norms = outside_norms(seen)
    if last is not None and last.end > 0:
        for call in seen.trace.calls:
            if call.path in norms and call.start > last.end and call.inputs[:1] == last.outputs[:1]:
                return call.path
        if seen.trace.error is None:
            return None
    owner = container.rpartition(".")[0]
    near = [path for path in norms if path.rpartition(".")[0] == owner and not re.search("emb", path, re.I)]
    return near[-1] if near and blocks[-1].pre_norm else None


def input_embedding(seen: Evidence, container: str) -> str | None:
    """What the nearest module around `container` that knows its input embedding says; else the first embedding."""
    around = container
    while True:
        getter = getattr(seen.modules.get(around), "get_input_embeddings", None)
        if callable(getter):
            try:
                found = seen.path_of.get(id(getter()))
            except (NotImplementedError, AttributeError):
                found = None
            if found is not None:
                return found
        if not around:
            break
        around = around.rpartition(".")[0]
    outside = [path for path, module in seen.modules.items() if is_embedding(module) and not seen.in_block(path)]
    return next((path for path in outside if not names.POSITION.search(path.rpartition(".")[2])), None)


def position_of(seen: Evidence, container: str) -> str | None:
    """The learned positions nearest to a stack: an embedding, or the module that holds them as a parameter."""
    found: list[str] = []
    for path, module in seen.modules.items():
        if seen.in_block(path):
            continue
        hints = [path.rpartition(".")[2]] if is_embedding(module) else list(own(module))
        if any(names.POSITION.search(hint) for hint in hints):
            found.append(path)
    found = [path for path in found if not names.RELATIVE.search(path.rpartition(".")[2])] or found

    def nearness(path: str) -> int:
        ours, theirs = container.split("."), path.split(".")
        return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))

    return max(found, key=nearness, default=None)


def settle_ends(seen: Evidence, found: Anatomy) -> None:
    """Everything outside the blocks: embeddings, positions, heads, poolers and norms."""
    stacks = found.stacks
    found.is_encoder_decoder = bool(getattr(seen.config, "is_encoder_decoder", False))
    found.causal = bool(stacks) and stacks[-1].causal
    found.hidden_size = found.blocks[0].hidden_size if found.blocks else integer([seen.config], ("hidden_size",))
    found.final_norms = [stack.final_norm for stack in stacks if stack.final_norm]
    outside = {path: module for path, module in seen.modules.items() if not seen.in_block(path)}
    tokens = {stack.embedding for stack in stacks} | {input_embedding(seen, "")}
    for path, module in outside.items():
        last = path.rpartition(".")[2]
        if is_embedding(module):
            seen.role[path] = (
                "token_type" if names.TOKEN_TYPE.search(last)
                else "position" if names.POSITION.search(last) and path not in tokens
                else "embedding"
            )  # fmt: skip
        elif is_conv(module):
            seen.role[path] = "patch" if re.search("patch|embed", path, re.I) else "stem" if found.blocks else "conv"
    embeddings = [path for path, role in seen.role.items() if role == "embedding"]
    if seen.trace.error is None:
        # T5 and BART keep a copy of the shared table that nobody calls.
        for path in [path for path in embeddings if seen.trace.first(path) is None]:
            del seen.role[path]
            embeddings.remove(path)
    found.embedding = next((path for path in embeddings if path in tokens), embeddings[0] if embeddings else None)
    found.position = next((stack.position for stack in stacks if stack.position), position_of(seen, ""))
    find_head(seen, found, outside)
    if found.embedding and found.head:
        ends = [own(seen.modules[path]).get("weight") for path in (found.embedding, found.head)]
        found.tied = ends[0] is not None and ends[0] is ends[1]
    first = seen.trace.first(found.blocks[0].path) if found.blocks else None
    for path in outside_norms(seen):
        if path in seen.norm_role:
            continue
        call = seen.trace.first(path)
        ends = [c.end for block in found.blocks[-1:] if (c := seen.trace.first(block.path))]
        after = bool(call and ends and ends[0] > 0 and call.start > ends[0])
        headed = seen.role.get(path.rpartition(".")[0] + ".dense", "").startswith("head") or (
            found.head is not None and path.partition(".")[0] == found.head.partition(".")[0] != ""
            and "." in found.head
        )  # fmt: skip
        seen.norm_role[path] = "norm.head" if after or headed else "norm.embedding" if first else "norm.other"


def find_head(seen: Evidence, found: Anatomy, outside: dict[str, nn.Module]) -> None:
    """The layer that makes the logits, and the linear layers on the way to it.

    A language model knows its output embedding. Else the head is what stands beside a transformers model's base, or
    what is called a head.
    """
    model = seen.model
    linear = [path for path, module in outside.items() if is_linear(module)]
    getter = getattr(model, "get_output_embeddings", None)
    output = None
    if callable(getter):
        try:
            output = seen.path_of.get(id(getter()))
        except (NotImplementedError, AttributeError):
            output = None
    base = getattr(model, "base_model_prefix", "")
    has_base = bool(base) and base in dict(model.named_children())
    if has_base:
        ours = [path for path in linear if path.split(".")[0] != base]
    else:
        ours = [
            path for path in linear
            if names.HEAD.fullmatch(path.split(".")[0]) or names.HEAD.fullmatch(path.rpartition(".")[2])
        ]  # fmt: skip
    if output is not None:
        found.head = output
    elif ours:
        calls = {path: call.start for path in ours if (call := seen.trace.first(path))}
        found.head = max(calls, key=lambda path: calls[path]) if calls else ours[-1]
        tops = [path.split(".")[0] for path in ours]
        if has_base:
            found.head_new = list(dict.fromkeys(tops))
        elif seen.config is None:
            found.head_new = [found.head]
    fresh = [path for path in getattr(model, FRESH, []) if path in seen.modules]
    found.head_new += [path for path in fresh if not any(holds(known, path) for known in found.head_new)]
    for path in linear:
        if path == found.head:
            seen.role[path] = "head"
        elif re.search("pooler", path, re.I):
            seen.role[path] = "pooler"
        elif path in ours:
            seen.role[path] = "head.transform"
        elif found.blocks:
            seen.role[path] = "projection"
