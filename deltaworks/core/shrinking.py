"""Heads and neurons as things to take out: which rows and columns are theirs, and layers without them."""

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


def neurons(base: Anatomy, block: Block) -> dict[str, Site]:
    """The weights of a block's feed-forward part by role: gate (if any), up and down; empty without these."""
    found = {
        str(site.role).rpartition(".")[2]: site
        for site in base.sites
        if site.block == block.index and site.parameter == "weight" and str(site.role).startswith("mlp.")
    }
    whole = "up" in found and "down" in found
    return {role: found[role] for role in ("gate", "up", "down") if whole and role in found}


def neuron_masks(found: Mapping[str, Site], stays: Tensor) -> Iterator[tuple[Site, Tensor]]:
    """For each weight of a feed-forward part what stays without some neurons, as a mask that spreads over `out x in`.

    Yields:
        the site, and `neurons x 1` (rows) for gate and up, `1 x neurons` (columns) for down.
    """
    for role, site in found.items():
        yield site, stays.unsqueeze(0) if role == "down" else stays.unsqueeze(1)


@torch.no_grad()
def without_heads(model: nn.Module, gone: Mapping[int, Sequence[int]]) -> nn.Module:
    """Take heads out of a model's layers for good, in place: query, key, value and output get smaller.

    Args:
        model: without adapters (`dw.bake` them first); its query, key and value must be layers of their own.
        gone: for a block's number, the units (`Heads.units`) that go, not all of them.

    Raises:
        ValueError: when there are adapters, or an attention cannot be made smaller. The model is then unchanged.
    """
    base, work = _bare(model), []
    for number, units in gone.items():
        block = base.blocks[number]
        found = heads(base, block)
        if found is None:
            raise ValueError(f"the heads of {block.path} are no rows of layers of their own and cannot be taken out")
        if len(set(units)) >= found.units:
            raise ValueError(f"{block.path} would lose all its {found.units} heads; leave at least one")
        for site, mask in head_masks(found, units):
            work.append((site, mask.flatten(), mask.shape[0] == 1))
    return _sliced(model, work, "heads")


@torch.no_grad()
def without_neurons(model: nn.Module, gone: Mapping[int, Sequence[int]]) -> nn.Module:
    """Take neurons out of a model's feed-forward parts for good, in place: gate, up and down get smaller.

    Args:
        model: without adapters (`dw.bake` them first).
        gone: for a block's number, the rows of its up projection that go, not all of them.

    Raises:
        ValueError: when there are adapters, or a feed-forward part cannot be made smaller. The model is then unchanged.
    """
    base, work = _bare(model), []
    for number, rows in gone.items():
        found = neurons(base, base.blocks[number])
        if not found:
            raise ValueError(f"{base.blocks[number].path} has no feed-forward part of plain layers to make smaller")
        stays = torch.ones(weight_at(model, found["down"]).fan_in, dtype=torch.bool)
        stays[list(rows)] = False
        if not stays.any():
            raise ValueError(f"{base.blocks[number].path} would lose all its {len(stays)} neurons; leave at least one")
        work += [(site, stays, role == "down") for role, site in found.items()]
    return _sliced(model, work, "neurons")


def _bare(model: nn.Module) -> Anatomy:
    if find_state(model) is not None:
        raise ValueError("the model still has adapters; dw.bake(model) first, so that its weights are final")
    return describe(model)


def _sliced(model: nn.Module, work: Sequence[tuple[Site, Tensor, bool]], what: str) -> nn.Module:
    """Keep rows (or columns) of linear layers, all of them checked before the first is changed."""
    layers = [model.get_submodule(site.path) for site, _, _ in work]
    for layer, (site, _, _) in zip(layers, work, strict=True):
        if type(layer) is not nn.Linear or site.rows is not None:
            raise ValueError(f"the {what} of {site.path} are no rows of layers of their own and cannot be taken out")
    for layer, (_, mask, columns) in zip(layers, work, strict=True):
        assert isinstance(layer, nn.Linear)
        stays = mask.nonzero().flatten().to(layer.weight.device)
        layer.weight = nn.Parameter(layer.weight.index_select(int(columns), stays), layer.weight.requires_grad)
        if columns:
            layer.in_features = len(stays)
            continue
        layer.out_features = len(stays)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.index_select(0, stays), layer.bias.requires_grad)
    return model
