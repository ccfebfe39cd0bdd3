"""How `describe` finds out: blocks and their layers (`layers`), norms and residuals (`flow`), the rest (`ends`)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import names
from .anatomy import Anatomy, Block, Site, Stack
from .ends import settle_ends, write_stack
from .evidence import Attention, Evidence, Unit
from .flow import settle_norms
from .fused import ask_causal
from .kinds import is_conv, is_embedding, is_linear, is_norm, own
from .layers import find_stacks, head_counts, look_at


def survey(model: nn.Module) -> Anatomy:
    """Describe `model`; see `deltaworks.model.anatomy.describe`."""
    seen = Evidence(model)
    containers = find_stacks(seen)
    seen.places = {child for container in containers for child in seen.children(container)}
    units = [[look_at(seen, path) for path in seen.children(container)] for container in containers]
    blocks: list[Block] = []
    stacks: list[Stack] = []
    for container, members in zip(containers, units, strict=True):
        settle_norms(seen, members)
        name = stack_name(seen, container, members)
        made = [write_block(seen, unit, len(blocks) + i, name) for i, unit in enumerate(members)]
        blocks += made
        stacks.append(write_stack(seen, container, name, made))
    found = Anatomy(seen.model, blocks=blocks, stacks=stacks)
    settle_ends(seen, found)
    found.sites = list(write_sites(seen, blocks))
    if any(seen.trace.first(block.path) is None for block in blocks):
        found.unseen = seen.trace.error
    return found


def write_block(seen: Evidence, unit: Unit, index: int, stack: str) -> Block:
    """The block as it is given out."""
    own_core, cross = unit.core(False), unit.core(True)
    heads, kv_heads, head_dim = head_counts(seen, own_core) if own_core else (None, None, None)
    return Block(
        path=unit.path,
        index=index,
        stack=stack,
        attention=own_core.path if own_core else None,
        cross_attention=cross.path if cross else None,
        mlp=unit.mlp_module,
        attention_out=unit.out.get("attention"),
        cross_attention_out=unit.out.get("cross_attention"),
        mlp_out=unit.out.get("mlp"),
        mlp_in=unit.mlp_in,
        attention_norm=unit.pre.get("attention") or unit.pre.get("ssm"),
        cross_attention_norm=unit.pre.get("cross_attention"),
        mlp_norm=unit.pre.get("mlp"),
        attention_post_norm=unit.post.get("attention"),
        mlp_post_norm=unit.post.get("mlp"),
        pre_norm=unit.leading_norm,
        parallel=unit.parallel,
        hidden_size=unit.hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ssm=unit.ssm,
        experts=unit.experts,
        router=unit.router,
        supports_attention_interface=own_core is not None and uses_registry(seen.get(own_core.path)),
        causal=is_causal(seen, unit),
    )


def is_causal(seen: Evidence, unit: Unit) -> bool:
    """Whether the block's self-attention, or its state, looks back only; asked once for each stack."""
    core = unit.core(False)
    if core is None:
        return unit.ssm is not None
    told = getattr(seen.get(core.path), "is_causal", None)
    question = (type(seen.get(core.path)), unit.path.rpartition(".")[0], told)
    if question not in seen.asked:
        seen.asked[question] = find_causal(seen, core, told)
    return seen.asked[question]


def find_causal(seen: Evidence, core: Attention, told: Any) -> bool:
    """Modules that say they are causal are believed; others may be given a causal mask from outside."""
    if told is True:
        return True
    values, output = core.first("value", "qkv"), core.first("output")
    sees_tokens = getattr(seen.model, "main_input_name", "") != "pixel_values"
    if values and output and sees_tokens and not re.search(r"vision|visual", core.path, re.I):
        answer = ask_causal(seen.model, values, output)
        if answer is not None:
            return answer
    return told if isinstance(told, bool) else bool(getattr(seen.config, "is_decoder", "decoder" in core.path))


def stack_name(seen: Evidence, container: str, units: list[Unit]) -> str:
    """ "vision" or "text" where the path or the model's input says so, else by what the blocks do."""
    parts = container.lower()
    both = getattr(seen.config, "is_encoder_decoder", False)
    if re.search(r"vision|visual|image", parts):
        return "vision"
    if re.search(r"text|language", parts):
        return "text"
    if getattr(seen.model, "main_input_name", "") == "pixel_values" and not both:
        return "vision"
    causal = any(is_causal(seen, unit) for unit in units)
    if any(unit.cores or unit.ssm for unit in units):
        if "decoder" in parts or "encoder" in parts:
            return "decoder" if "decoder" in parts else "encoder"
        return "decoder" if causal else "encoder"
    return "body"


def write_sites(seen: Evidence, blocks: list[Block]) -> Iterator[Site]:
    """All sites: parameters in model order, each fused one followed by its parts; then whole modules."""
    index = {block.path: block.index for block in blocks}
    numbers: dict[Any, int] = {}
    for path, module in seen.modules.items():
        place = seen.block_of(path)
        block = index.get(place) if place else None
        role, called = seen.role.get(path), path not in seen.uncalled
        shared: dict[str, Any] = {"block": block, "called": called}
        if is_norm(module):
            held = own(module)
            parameter = "weight" if "weight" in held else next(iter(held), None)
            yield Site(path, seen.norm_role.get(path, "norm.other"), "norm", parameter, **shared)
            continue
        kind = (
            "linear" if is_linear(module) else "conv" if is_conv(module)
            else "embedding" if is_embedding(module) else "other"
        )  # fmt: skip
        call = seen.trace.first(path)
        if kind == "linear" and call is not None and call.inputs:
            shared["reads"] = numbers.setdefault(call.inputs[0], len(numbers))
        if kind == "embedding" and role is None and names.POSITION.search(path.rpartition(".")[2]):
            role = "position"
        for parameter in own(module):
            if parameter == "bias" or (kind != "other" and parameter != "weight"):
                continue
            key, here, sort = f"{path}:{parameter}", role, kind
            if parameter == "in_proj_weight" and path in seen.rows:
                here, sort, key = "attention.qkv", "linear", path
            elif key in seen.role:
                here, sort = seen.role[key], "experts"
            elif kind == "other" and role != "router":
                here = parameter_role(seen, path, parameter)
            yield Site(path, here, sort, parameter, **shared)
            rows_at = seen.rows.get(key if sort == "experts" or parameter != "weight" else path, {})
            family = (here or "").partition(".")[0]
            for part, rows in rows_at.items():
                yield Site(path, f"{family}.{part}", sort, parameter, part, rows, **shared)
    yield from module_sites(blocks)


def parameter_role(seen: Evidence, path: str, parameter: str) -> str | None:
    """The role of a parameter that no layer owns: learned positions, class tokens, a state's decay."""
    if names.POSITION.search(parameter):
        return "position"
    if re.search(r"(cls|class|mask|dist\w*)_(token|embedding)", parameter, re.I):
        return "class_token"
    if any(role.startswith("ssm.") and name.rpartition(".")[0] == path for name, role in seen.role.items()):
        return f"ssm.{parameter.lower()}"
    return None


def module_sites(blocks: list[Block]) -> Iterator[Site]:
    """Blocks and their sub-layers as wholes."""
    for block in blocks:
        for role, kind, path in (
            ("block", "block", block.path), ("attention", "attention", block.attention),
            ("cross_attention", "attention", block.cross_attention), ("mlp", "mlp", block.mlp),
            ("ssm", "other", block.ssm), ("experts", "other", block.experts),
        ):  # fmt: skip
            if path is not None:
                yield Site(path, role, kind, None, block=block.index)


def uses_registry(module: nn.Module) -> bool:
    """Whether the forward of an attention module looks its attention function up in transformers' registry."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
