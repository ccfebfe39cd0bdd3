"""Attention heads as things to take out: which rows and columns are theirs, and layers without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.anatomy import Anatomy, Block, Site, describe
from .attach import find_state
from .method import weight_at

ROLES = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Heads:
    """The heads of one self-attention.

    Attributes:
        sites: of query, key, value and output.
        units: how many heads can go by themselves; queries that share a key go together.
        sizes: for every role the width of the weight's side that is made of heads.
    """

    sites: Mapping[str, Site]
    units: int
    sizes: Mapping[str, int]


def heads(base: Anatomy, block: Block) -> Heads | None:
    """The heads of a block's self-attention; None where it has none that can be told apart."""
    found = {
        str(site.role).rpartition(".")[2]: site
        for site in base.sites
        if site.block == block.index and site.parameter == "weight" and str(site.role).startswith("attention.")
    }
    if any(role not in found for role in ROLES) or not block.num_heads:
        return None
    weights = {role: weight_at(base.model, found[role]) for role in ROLES}
    sizes = {role: weight.fan_in if role == "output" else weight.fan_out for role, weight in weights.items()}
    units = block.num_kv_heads or block.num_heads
    if any(size % units for size in sizes.values()):
        return None
    return Heads({role: found[role] for role in ROLES}, units, sizes)


def head_masks(found: Heads, gone: Sequence[int]) -> Iterator[tuple[Site, Tensor]]:
    """For each of the four weights what stays without some units, as a mask that spreads over `out x in` when used.

    Yields:
        the site, and `size x 1` (rows) for query, key and value, `1 x size` (columns) for the output.
    """
    for role in ROLES:
        stays = torch.ones(found.units, dtype=torch.bool)
        stays[list(gone)] = False
        stays = stays.repeat_interleave(found.sizes[role] // found.units)
        yield found.sites[role], stays.unsqueeze(0) if role == "output" else stays.unsqueeze(1)


@torch.no_grad()
def without_heads(model: nn.Module, gone: Mapping[int, Sequence[int]]) -> nn.Module:
    """Take heads out of a model's layers for good, in place: query, key, value and output get smaller.

    Args:
        model: without adapters (`dw.bake` them first); its query, key and value must be layers of their own.
        gone: for a block's number, the units (`Heads.units`) that go, not all of them.

    Raises:
        ValueError: when there are adapters, or an attention cannot be made smaller. The model is then unchanged.
    """
    if find_state(model) is not None:
        raise ValueError("the model still has adapters; dw.bake(model) first, so that its weights are final")
    base = describe(model)
    work: list[tuple[nn.Linear, Tensor, bool]] = []
    for number, units in gone.items():
        block = base.blocks[number]
        found = heads(base, block)
        layers = {role: model.get_submodule(site.path) for role, site in found.sites.items()} if found else {}
        fused = found is None or any(site.rows is not None for site in found.sites.values())
        if found is None or fused or any(type(layer) is not nn.Linear for layer in layers.values()):
            raise ValueError(f"the heads of {block.path} are no rows of layers of their own and cannot be taken out")
        if len(set(units)) >= found.units:
            raise ValueError(f"{block.path} would lose all its {found.units} heads; leave at least one")
        for (_, mask), (role, layer) in zip(head_masks(found, units), layers.items(), strict=True):
            assert isinstance(layer, nn.Linear)
            work.append((layer, mask.flatten().nonzero().flatten(), role == "output"))
    for layer, stays, columns in work:
        stays = stays.to(layer.weight.device)
        layer.weight = nn.Parameter(layer.weight.index_select(int(columns), stays), layer.weight.requires_grad)
        if columns:
            layer.in_features = len(stays)
        else:
            layer.out_features = len(stays)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.index_select(0, stays), layer.bias.requires_grad)
    return model
