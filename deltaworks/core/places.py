"""Where in a block the parts go that change activations: after a sub-layer, beside it, at its norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..model.anatomy import Anatomy, Block, Site, Stack


def blocks_at(base: Anatomy, on: object, slug: str) -> list[Block]:
    """The blocks that hold any of the sites `on` names (`"block"` for all).

    Raises:
        ValueError: when `on` matches nothing, or the model has no blocks.
    """
    if not base.blocks:
        raise ValueError(
            f"{slug} sits in the blocks of a transformer or a similar stack, and {type(base.model).__name__} has none"
        )
    chosen = {site.block for site in base.select(on, what="module")}
    return [block for block in base.blocks if block.index in chosen]


def width_of(block: Block, base: Anatomy, slug: str) -> int:
    """Width of a block's residual stream.

    Raises:
        ValueError: when it is not known.
    """
    width = block.hidden_size or base.hidden_size
    if width is None:
        raise ValueError(f"{slug}: the width of {block.path} is not known")
    return width


def at_module(path: str, block: Block, role: str) -> Site:
    """The site of a whole module in a block."""
    return Site(path, role, "other", None, block=block.index)


def ends(block: Block, role: str) -> tuple[str | None, str | None]:
    """The module that reads what the sub-layer reads and the one whose output is the sub-layer's."""
    if role == "mlp":
        whole, first, last = block.mlp, block.mlp_in, block.mlp_out
    else:
        whole, first, last = block.attention, block.attention, block.attention_out
    if whole is None and first is None and last is None:
        return (block.ssm, block.ssm) if block.attention is None and block.mlp_out is None else (None, None)
    # A module around the whole sub-layer gives both at once (its output is `last`'s, at most before a dropout).
    if whole is not None and last is not None and (last == whole or last.startswith(whole + ".") or role == "mlp"):
        return whole, whole
    return first, last


def positions(base: Anatomy, stack: Stack) -> list[str]:
    """The modules that embed or rotate by the positions of a stack's text; none where it reads no text, or has none."""
    around = stack.path.rpartition(".")[0]
    names = around.split(".")
    owners = (base.model.get_submodule(".".join(names[:end])) for end in range(len(names), -1, -1))
    read = next((owner.main_input_name for owner in owners if hasattr(owner, "main_input_name")), "input_ids")
    if read != "input_ids":
        return []
    found = [stack.position] if stack.position else []
    for path, module in base.model.get_submodule(around).named_modules(prefix=around):
        if any(name.endswith("inv_freq") for name in module._buffers):
            found.append(path)
    return found


def pieces(base: Anatomy, chosen: list[Site]) -> list[Site]:
    """Every linear layer; a fused one of which only parts are chosen as its parts; in the model's order."""
    partly = {(site.path, site.parameter) for site in chosen if site.part is not None}
    whole = [site for site in base.select("all", what="weight") if (site.path, site.parameter) not in partly]
    parts = [site for site in base.sites if site.part is not None and (site.path, site.parameter) in partly]
    order = {site: index for index, site in enumerate(base.sites)}
    return sorted(dict.fromkeys([*whole, *parts, *chosen]), key=lambda site: order.get(site, len(order)))


def norm_parameters(base: Anatomy, sites: list[Site]) -> list[Site]:
    """A site for every scale and shift of some norms."""
    return [
        replace(site, parameter=parameter)
        for site in sites
        for parameter in ("weight", "bias")
        if base.model.get_submodule(site.path)._parameters.get(parameter) is not None
    ]


def evenly(sizes: Sequence[int], wanted: int) -> list[Tensor]:
    """Indices within each of some parts, ascending: so many of all their entries, evenly spread over them."""
    total = sum(sizes)
    number = min(wanted, total)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.arange(number) * total // number] = True
    return [part.nonzero().flatten() for part in chosen.split(list(sizes))]
