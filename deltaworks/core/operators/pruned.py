"""Starting a thin copy of a model from sub-matrices of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...model.anatomy import Anatomy, Block, Site, Stack
from ...model.weights import Weight

Importance = Callable[[Weight], Tensor]
"""Scores of a weight's entries, of the shape of its matrix."""


def thinned(config: object, reduction: int, kept: Sequence[int]) -> dict:
    """The configuration of a copy with `kept` of the blocks whose widths are divided by `reduction`, head counts kept.

    Where positions are rotated the rotated share of a head stays even, and experts' widths stay multiples of 8, which
    makes the copy of a very small model a little wider than asked.

    Args:
        config: of a transformers model; left as it is.
        reduction: r, by which widths are divided.
        kept: indices of the blocks, ascending.
    """
    thin = copy.deepcopy(config)
    total, heads = thin.num_hidden_layers, getattr(thin, "num_attention_heads", None) or 1  # type: ignore[attr-defined]
    width = thin.hidden_size  # type: ignore[attr-defined]
    rotary = (getattr(thin, "rope_parameters", None) or {}) if hasattr(thin, "rope_parameters") else {}
    share = rotary.get("partial_rotary_factor", 1.0) if isinstance(rotary, dict) else 1.0

    # Grouped matrix products of experts want rows of whole 16 bytes, in the smallest of dtypes.
    grain = 8 if any(hasattr(thin, name) for name in ("num_experts", "num_local_experts", "n_routed_experts")) else 1

    def head(size: int) -> int:
        small = max(size // reduction, 1)
        while heads * small % grain or (
            hasattr(thin, "rope_parameters") and (int(small * share) % 2 or not int(small * share))
        ):
            small += 1
        return small

    def inner(size: int) -> int:
        return max(-(-(size // reduction) // grain) * grain, 1)

    narrow = heads * head(width // heads)
    for name in ("head_dim", "d_kv", "query_pre_attn_scalar"):
        if isinstance(vars(thin).get(name), int):
            setattr(thin, name, head(getattr(thin, name)))
    for name in ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner",
                 "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"):  # fmt: skip
        size = getattr(thin, name, None)
        if isinstance(size, int):
            expand = getattr(thin, "expand", None)
            setattr(thin, name, narrow * expand if expand and size == width * expand else inner(size))
    for name in ("hidden_size", "word_embed_proj_dim", "embedding_size", "pooler_hidden_size"):
        if getattr(thin, name, None) == width:
            setattr(thin, name, narrow)
    for name, value in list(vars(thin).items()):
        if isinstance(value, list) and len(value) == total and name != "architectures":
            setattr(thin, name, [value[index] for index in kept])
    if getattr(thin, "mlp_only_layers", None):
        thin.mlp_only_layers = [i for i, index in enumerate(kept) if index in thin.mlp_only_layers]  # type: ignore
    for name in ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if hasattr(thin, name):
            setattr(thin, name, len(kept))
    thin.vocab_size, thin.pad_token_id = 1, 0  # type: ignore[attr-defined]
    written = thin.to_dict()  # type: ignore[attr-defined]
    for name in ("architectures", "dtype", "transformers_version", "id2label", "label2id", "_name_or_path",
                 "quantization_config", "auto_map"):  # fmt: skip
        written.pop(name, None)
    # What the vocabulary no longer has; null, not absent, lest the architecture's defaults come back.
    tokens = {name: None for name in written if name.endswith("_token_id") and name != "pad_token_id"}
    tokens |= {f"{name}_token_id": None for name in ("bos", "eos", "sep", "cls", "decoder_start", "forced_eos")}
    return written | tokens


@torch.no_grad()
def prune_into(
    thin: Anatomy, base: Anatomy, backbones: Sequence[tuple[str, str]], kept: Sequence[int], importance: Importance
) -> None:
    """Write sub-matrices of a base's weights into a thin copy, those of base block `kept[i]` into its block i.

    The residual stream's entries are chosen anew after every sub-layer, by the rows of its last matrix that matter
    most; they are the columns of what follows. Query, key and value share their rows, and so do gate and up: those with
    the greatest L1 norm of the product of their importances. Rows stay in ascending order.

    Args:
        thin: of the copy, whose parameters are written.
        base: of the model; both with the same stacks.
        backbones: for every stack, paths of the module that embeds and runs it, in the copy and in the base.
        kept: for every stack, indices of its blocks, ascending.
        importance: scores of a weight's entries.
    """
    for thin_stack, base_stack, paths in zip(thin.stacks, base.stacks, backbones, strict=True):
        _Walk(thin, base, thin_stack, base_stack, kept, importance).go(*paths)


class _Walk:
    """One stack, from its embedding to its last norm.

    Attributes:
        stream: the entries of the residual stream that are kept at the present place.
    """

    def __init__(
        self, thin: Anatomy, base: Anatomy, thin_stack: Stack, base_stack: Stack, kept: Sequence[int],
        importance: Importance,
    ) -> None:  # fmt: skip
        self.thin, self.base, self.kept, self.importance = thin, base, kept, importance
        self.thin_stack, self.base_stack = thin_stack, base_stack
        self.narrow, self.wide = int(thin.hidden_size or 0), int(base.hidden_size or 0)
        embedding = base.model.get_submodule(str(base_stack.embedding))
        self.stream = _top(importance(Weight(embedding)).sum(-1), self.narrow)

    def go(self, around: str, other: str) -> None:
        """Write every parameter of the copy's backbone `around` from that of the base's, `other`."""
        start, written = self.stream, set[str]()
        shapes: dict[str, Site] = {}
        for number in self.thin_stack.blocks:
            shapes |= self._sites(self.thin, number)
        for index, number in enumerate(self.base_stack.blocks):
            target = self.thin_stack.blocks[self.kept.index(index)] if index in self.kept else None
            own = self._sites(self.thin, target) if target is not None else {}
            block = self.base.blocks[number]
            done = self._block(block, self._sites(self.base, number), own, shapes)
            if target is not None:
                path = self.thin.blocks[target].path
                self._rest(path, block.path, self.stream, skip=done)
                written.add(f"{path}.")
        given = dict(self.base.model.get_submodule(other).named_parameters())
        for name, parameter in self.thin.model.get_submodule(around).named_parameters():
            full = f"{around}.{name}".lstrip(".")
            unused = (self.thin_stack.embedding, self.thin_stack.position)
            if any(full.startswith(path) for path in written) or full.rpartition(".")[0] in unused or name not in given:
                continue
            last = full.startswith(f"{self.thin_stack.final_norm}.")
            self._cut(parameter, f"{other}.{name}".lstrip("."), self.stream if last else start)

    def _sites(self, anatomy: Anatomy, number: int) -> dict[str, Site]:
        """The places of a block that have a role; of a fused weight its parts."""
        found = [site for site in anatomy.sites if site.block == number and site.parameter is not None and site.role]
        return {str(site.role): site for site in found}

    def _block(
        self, block: Block, base: dict[str, Site], thin: dict[str, Site], shapes: dict[str, Site]
    ) -> set[tuple[str, str]]:
        """Choose and copy the sub-layers of one block; paths and names of the thin parameters that are done."""
        done: set[tuple[str, str]] = set()

        def norm(role: str) -> None:
            if role in thin:
                place, own = thin[role], self.thin.model.get_submodule(thin[role].path)
                for name, parameter in own.named_parameters():
                    self._cut(parameter, f"{base[role].path}.{name}", self.stream)
                    done.add((place.path, name))

        def copy_rows(role: str, rows: Tensor, columns: Tensor) -> None:
            if role in thin:
                self._copy(thin[role], base[role], rows, columns)
                done.update((thin[role].path, name) for name in (str(thin[role].parameter), "bias"))

        for name in ("attention", "cross_attention", "mlp", "expert"):
            ins = [f"{name}.{part}" for part in ("query", "key", "value", "gate", "up") if f"{name}.{part}" in base]
            out = next((role for role in (f"{name}.output", f"{name}.down") if role in base), None)
            if not ins or out is None or out not in shapes:
                continue
            layer = "mlp" if name == "expert" else name
            if block.pre_norm:
                norm(f"{layer}.norm")
            if name == "expert" and "router" in thin:
                self._cut(_parameter(self.thin, thin["router"]), _name(base["router"]), self.stream)
                done.add((thin["router"].path, str(thin["router"].parameter)))
            number = min(_weight(self.thin, shapes[role]).fan_out for role in ins)
            rows = self._rows([base[role] for role in ins], number)
            for role in ins:
                copy_rows(role, rows[role], self.stream)
            inner = rows[ins[0]]
            last = _weight(self.base, base[out])
            scores = _flat(self.importance(last)).index_select(-1, inner).sum(-1)
            after = _top(scores, self.narrow)
            copy_rows(out, after, inner)
            self.stream = after
            if not block.pre_norm:
                norm(f"{layer}.norm")
            norm(f"{layer}.post_norm")
        return done

    def _rows(self, sites: Sequence[Site], number: int) -> dict[str, Tensor]:
        """The rows that each of some weights keeps; wider ones (queries of grouped heads) keep the same of each group.

        Args:
            sites: weights that read the stream.
            number: rows that the narrowest keeps.
        """
        scores = {str(site.role): _flat(self.importance(_weight(self.base, site))) for site in sites}
        least = min(score.shape[0] for score in scores.values())
        product: Tensor | float = 1.0
        for site in sites:
            score = scores[str(site.role)].index_select(-1, self.stream)
            product = product * _grouped(score, least, self._head(site)).sum(1)
        assert isinstance(product, Tensor)
        chosen = _top(product.sum(-1), number)
        rows = {}
        for site in sites:
            every = torch.arange(scores[str(site.role)].shape[0], device=chosen.device)
            picked = _grouped(every, least, self._head(site)).index_select(0, chosen)  # kept rows x group
            heads = number // max(number * self._head(site) // least, 1)
            rows[str(site.role)] = picked.unflatten(0, (max(heads, 1), -1)).transpose(1, 2).flatten()
        return rows

    def _head(self, site: Site) -> int:
        """Rows of one head, 1 where there are none."""
        size = self.base.blocks[site.block or 0].head_dim if "attention" in str(site.role) else None
        return size or 1

    def _copy(self, thin: Site, base: Site, rows: Tensor, columns: Tensor) -> None:
        for name in (str(thin.parameter), "bias"):
            own = Weight(self.thin.model.get_submodule(thin.path), name, thin.rows)
            given = Weight(self.base.model.get_submodule(base.path), name, base.rows)
            if own.stored is None or given.stored is None:
                continue
            value = given.matrix()
            value = value[rows] if value.dim() == 1 else value.index_select(-2, rows).index_select(-1, columns)
            whole = own.replaced(value.to(own.dtype), own.canonical(own.stored.detach()).clone())
            own.stored.copy_(own.layout(whole))

    def _rest(self, thin: str, base: str, stream: Tensor, skip: set[tuple[str, str]]) -> None:
        first = self.base.blocks[self.base_stack.blocks[0]].path
        for name, parameter in self.thin.model.get_submodule(thin).named_parameters():
            path, _, last = f"{thin}.{name}".rpartition(".")
            if (path, last) not in skip:
                has = name in dict(self.base.model.get_submodule(base).named_parameters())
                # The copy's first block may have what only the base's first has: T5's table of relative positions.
                self._cut(parameter, f"{base if has else first}.{name}", stream)

    def _cut(self, parameter: Tensor, name: str, stream: Tensor) -> None:
        """Any other parameter: the stream's entries where it is as wide, else those with the greatest L1 norm."""
        path, _, last = name.rpartition(".")
        module = self.base.model.get_submodule(path)
        value = module.get_parameter(last).detach()
        weight = Weight(module, last, path=path)
        score = weight.layout(self.importance(weight))
        for dim, (size, full) in enumerate(zip(parameter.shape, value.shape, strict=True)):
            if size != full:
                others = tuple(other for other in range(value.dim()) if other != dim)
                best = _top(score.sum(others) if others else score, size)
                index = stream if (size, full) == (self.narrow, self.wide) else best
                value, score = value.index_select(dim, index), score.index_select(dim, index)
        parameter.copy_(value)


def _weight(anatomy: Anatomy, site: Site) -> Weight:
    rows = None if site.rows is None else list(site.rows)
    return Weight(anatomy.model.get_submodule(site.path), str(site.parameter), rows, site.path)


def _parameter(anatomy: Anatomy, site: Site) -> Tensor:
    return anatomy.model.get_submodule(site.path).get_parameter(str(site.parameter))


def _name(site: Site) -> str:
    return f"{site.path}.{site.parameter}"


def _flat(scores: Tensor) -> Tensor:
    """Scores of stacked experts as those of one."""
    return scores.sum(0) if scores.dim() == 3 else scores


def _top(scores: Tensor, number: int) -> Tensor:
    """Indices of the greatest scores, ascending."""
    return scores.topk(number).indices.sort().values


def _grouped(rows: Tensor, least: int, head: int) -> Tensor:
    """`(least x group x ...)`: rows of several heads that share one narrow head, side by side."""
    group = rows.shape[0] // least
    return rows.unflatten(0, (-1, group, head)).transpose(1, 2).flatten(0, 1) if group > 1 else rows[:, None]
