"""What a model is made of, found by looking: its blocks, and every place in them by its role.

`describe(model)` reads module kinds, shapes, the small vocabulary of `names`, the configuration, and a `trace` of one
forward pass on the meta device. There is no table of architectures: a model nobody has heard of is described as far as
it resembles the others, and the rest of it can be addressed by name or type.

Roles
    attention.query .key .value .output, attention.qkv (fused, whole), attention.kv, cross_attention.* likewise
    mlp.gate .up .down, mlp.gate_up (fused, whole); a feed-forward part without gate has up and down
    expert.gate .up .down, expert.gate_up: the same inside a mixture, fused in 3-D parameters or not; router
    ssm.in .x .dt .conv .out: a state-space mixer; conv: a convolution in a block
    attention.norm, mlp.norm, ...: the norm of a sub-layer; .post_norm: one on its output before the residual is added
    norm.embedding, norm.final, norm.head: norms outside the blocks
    embedding, position, token_type, patch, class_token, stem, projection, pooler, head, head.transform
    block, attention, cross_attention, mlp, experts, ssm: whole modules
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

What = Literal["weight", "module"]

FRESH = "_deltaworks_fresh"
"""Attribute with the paths of a loaded model's modules that its checkpoint had no values for."""


@dataclass(frozen=True)
class Site:
    """A place in a model where something can change.

    Attributes:
        path: dotted module name, "" for the model itself.
        role: the place's architecture-independent name, None when it has none.
        kind: "linear", "conv", "embedding", "norm", "experts" or "other" for a place with a parameter; "block",
            "attention", "mlp" or "other" for a whole module.
        parameter: which of the module's own parameters; None for a whole module.
        part: "query", "gate", ... when the site is some output rows of a fused weight.
        rows: those rows (indices into the output dimension), None for all.
        block: index into `Anatomy.blocks`, None outside the blocks.
        called: False when the weight is used without calling the layer that owns it (Mamba's `conv1d` and `dt_proj`),
            so that a change must go through the weight itself.
    """

    path: str
    role: str | None
    kind: str
    parameter: str | None = "weight"
    part: str | None = None
    rows: tuple[int, ...] | None = None
    block: int | None = None
    called: bool = True
    reads: int | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Path of the module or of the parameter, with the part in brackets."""
        full = self.path if self.parameter in (None, "weight") else f"{self.path}.{self.parameter}".lstrip(".")
        return f"{full}[{self.part}]" if self.part else full


@dataclass(frozen=True)
class Block:
    """One repeated unit of a model. All module names are full dotted paths, None where there is no such thing.

    Attributes:
        path: the block itself.
        index: its number in `Anatomy.blocks`.
        stack: the name of the stack it belongs to ("decoder", "encoder", "vision", "text", "body").
        attention, cross_attention: the module that computes attention (the one that holds the query projection).
        mlp: the feed-forward module, None when its layers belong to the block itself (OPT, BART) or to two modules
            (BERT); `mlp_in` and `mlp_out` are there all the same.
        attention_out, cross_attention_out, mlp_out: the module whose output is what the sub-layer adds to the residual.
        mlp_in: the outermost module whose input is the input of the feed-forward sub-layer.
        attention_norm, cross_attention_norm, mlp_norm: the norm before the sub-layer when `pre_norm`, else the one
            after its residual (or, as in OLMo 2, on its output). A state-space mixer's norm is `attention_norm`.
        attention_post_norm, mlp_post_norm: a norm on the sub-layer's output, before the residual (Gemma 3).
        pre_norm: whether the sub-layers read a normalised copy of the residual stream.
        parallel: whether attention and feed-forward part read the same stream side by side.
        hidden_size: width of the residual stream.
        num_heads, num_kv_heads, head_dim: of the self-attention.
        ssm: a state-space mixer; experts: the module that holds the experts; router: what chooses among them.
        supports_attention_interface: whether attention goes through transformers' attention registry, where a prefix
            or an extra term can enter.
        causal: whether self-attention looks back only.
    """

    path: str
    index: int
    stack: str
    attention: str | None = None
    cross_attention: str | None = None
    mlp: str | None = None
    attention_out: str | None = None
    cross_attention_out: str | None = None
    mlp_out: str | None = None
    mlp_in: str | None = None
    attention_norm: str | None = None
    cross_attention_norm: str | None = None
    mlp_norm: str | None = None
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    pre_norm: bool = True
    parallel: bool = False
    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ssm: str | None = None
    experts: str | None = None
    router: str | None = None
    supports_attention_interface: bool = False
    causal: bool = False


@dataclass(frozen=True)
class Stack:
    """A run of blocks with what belongs to it.

    Attributes:
        name: "decoder", "encoder", "vision", "text" or "body".
        path: the container of the blocks (the `ModuleList`).
        blocks: indices into `Anatomy.blocks`.
        embedding: the module whose output enters the first block, before positions where those are separate: the
            token embedding, or the patch embedding of a vision model.
        position: the module with learned position embeddings.
        final_norm: the norm after the last block.
        causal: whether its self-attention looks back only.
    """

    name: str
    path: str
    blocks: tuple[int, ...]
    embedding: str | None = None
    position: str | None = None
    final_norm: str | None = None
    causal: bool = False


@dataclass
class Anatomy:
    """A model and what is known of it.

    Attributes:
        sites: parameter sites, then whole modules, both in model order; a fused weight stands there whole and by part.
        blocks: the blocks of all stacks in model order.
        hidden_size: width of the residual stream (of the first stack, where there are several).
        embedding, position: the token embedding and the learned position embedding.
        head: the layer that makes the logits.
        head_new: modules that pre-training does not give, such as a classifier, and those the checkpoint had no values
            for: they must be trained.
        tied: whether the head uses the embedding's weight.
        final_norms: the norms after the last blocks.
        is_encoder_decoder, causal: what the model says of itself; causal: every later token is hidden from earlier ones
            in the stack that makes the output.
        unseen: why the forward pass could not be followed (then norms and sub-layer outputs are guesses), else None.
    """

    model: nn.Module
    sites: list[Site] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    hidden_size: int | None = None
    embedding: str | None = None
    position: str | None = None
    head: str | None = None
    head_new: list[str] = field(default_factory=list)
    tied: bool = False
    final_norms: list[str] = field(default_factory=list)
    is_encoder_decoder: bool = False
    causal: bool = False
    unseen: str | None = None

    def select(self, on: object, what: What = "weight", *, strict: bool = True) -> list[Site]:
        """The sites that `on` names; see `deltaworks.model.select.select`."""
        from .select import select

        return select(self, on, what, strict=strict)

    @functools.cached_property
    def by_path(self) -> dict[str, list[Site]]:
        """The sites of every module that has any, in model order."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.path, []).append(site)
        return found

    def roles(self) -> dict[str, int]:
        """Every role there is with the number of its sites."""
        counts: dict[str, int] = {}
        for site in self.sites:
            if site.role:
                counts[site.role] = counts.get(site.role, 0) + 1
        return dict(sorted(counts.items()))

    def tree(self, marked: Sequence[Site] | None = None) -> str:
        """The folded module tree as text; `marked` sites carry a mark."""
        from .tree import plain

        return plain(self, marked)


_KNOWN: WeakKeyDictionary[nn.Module, tuple[int, Anatomy]] = WeakKeyDictionary()


def describe(model: nn.Module) -> Anatomy:
    """Find out what `model` is made of.

    Costs a pass over the module tree and one traced pass without weights, some ten milliseconds; the result is kept
    until modules are added, removed or replaced. What this library has attached does not show in it.
    """
    from .kinds import base_modules
    from .survey import survey

    # A graft swaps a layer's class in place, so identities of modules are what the description depends on.
    print_ = hash(tuple((path, id(module)) for path, module in base_modules(model)))
    known = _KNOWN.get(model)
    if known is not None and known[0] == print_:
        return replace(known[1], model=model)
    # Neither an inference mode nor a default device around the call may reach into the traced passes.
    with torch.inference_mode(False), torch.device("cpu"):
        found = survey(model)
    _KNOWN[model] = (print_, replace(found, model=nn.Identity()))  # without the model, or it would never be freed
    return found


def select(model: nn.Module | Anatomy, on: object, what: What = "weight", *, strict: bool = True) -> list[Site]:
    """The sites of a model that `on` names; see `deltaworks.model.select.select`."""
    anatomy = model if isinstance(model, Anatomy) else describe(model)
    return anatomy.select(on, what, strict=strict)
