"""Prefix-tuning: optimizing continuous prompts for generation (Li & Liang 2021, arXiv:2101.00190).

Attention reads [P_k; K] and [P_v; V] instead of K and V, with P_k, P_v of its own in every layer. While training,
[P_k; P_v] of all layers are an MLP of m embeddings, tanh between two linear layers; at the end of training the table
it makes takes its place, and only that is kept. Encoder, decoder and cross-attention have embeddings and an MLP each,
as in the authors' code.
Prefix keys have no position and no window hides them; text begins at position 0. HF PEFT keeps prefixes in the cache:
text begins at m (`positions="shifted"` here), sliding windows forget them, and of an encoder-decoder only the decoder's
self-attentions have one, layer i that of layer 2 i, counted round and round.
Use it for generation with one frozen base and many tasks: a prefix costs keys and values only, at any depth.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import fields
from ...core.init import normal
from ...core.method import Method, Placed
from ...core.operators.prefix import EncodedPrefix, PrefixEncoder, PrefixKV, ShiftedPositions
from ...core.part import Shared
from ...core.places import positions
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.anatomy import Anatomy, Block, Site


@method("prefix_tuning", paper="2101.00190", family="prompts")
class PrefixTuning(Method):
    """Trained keys and values; keeps `2 * length * key heads * head size` values an attention."""

    overridable = False
    mergeable = False
    exact_at_start = False
    default_lr = 5e-5
    refuses = ("mamba",)

    length: int = fields.positive(10, "m, positions in front; the paper takes 10 for tables, 200 for summaries")
    hidden: int | None = fields.positive(
        512, "b, inner width of the MLP while training (800 for summaries); none trains the table itself", optional=True
    )
    dropout: float = fields.fraction(0.0, "probability of dropping an entry of the prefix")
    init: str = fields.choice("random", ("random", "text"), "start of the table; text (with hidden=none): as init_ids'")
    init_ids: list[int] = fields.token_ids("tokens whose keys and values the table starts from, repeated or cut to m")
    positions: str = fields.choice("text", ("text", "shifted"), "where text begins: at 0, or at m as with HF PEFT")
    on: Any = fields.sites("all", "which attentions: all, or modules or blocks by role, regular expression or type")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init == "text") != bool(self.init_ids):
            raise ValueError("prefix_tuning: init='text' and init_ids belong together; give both or neither")
        if self.init == "text" and self.hidden is not None:
            raise ValueError("prefix_tuning: the MLP cannot start from text; give hidden=none with init='text'")

    def shared(self, base: Anatomy) -> dict[str, Shared]:
        if self.hidden is None:
            return {}
        kinds = len({kind for _, _, kind in self._attentions(base)})
        return {"encoder": PrefixEncoder(kinds, self.length, base.hidden_size or 1, self.hidden)}

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        attentions = self._attentions(base)
        kinds = list(dict.fromkeys(kind for _, _, kind in attentions))
        texts = self._text(base) if self.init == "text" else None
        for number, (path, block, kind) in enumerate(attentions):
            heads, size = block.num_kv_heads or block.num_heads, block.head_dim
            if heads is None or size is None:
                raise ValueError(f"prefix_tuning cannot tell how many heads {path} has; name other modules with on=")
            site = Site(path, role="attention", kind="attention", parameter=None, block=block.index)
            if self.hidden is not None:
                encoder = shared["encoder"]
                assert isinstance(encoder, PrefixEncoder)
                part = EncodedPrefix(kinds.index(kind), heads, size, self.hidden, self.dropout, encoder)
            else:
                shape = (heads, self.length, size)
                key, value = texts[number] if texts is not None else (normal(*shape), normal(*shape))
                part = PrefixKV(key, value, self.dropout)
            yield Placed(site, part, "prefix")
        if self.positions == "shifted":
            yield from self._shifts(base, {kind for _, _, kind in attentions})

    def rules(self) -> list[Rule]:
        return [Tabulation()] if self.hidden is not None else []

    def _attentions(self, base: Anatomy) -> list[tuple[str, Block, str]]:
        """Path, block and kind of every attention that gets a prefix."""
        chosen = [
            (path, block, f"{block.stack}.{name}")
            for block in base.blocks
            for name, path in (("self", block.attention), ("cross", block.cross_attention))
            if path is not None
        ]
        if self.on != "all":
            under = [site.path for site in base.select(self.on, what="module")]
            chosen = [item for item in chosen if any(f"{item[0]}.".startswith(f"{path}.") for path in under)]
        model = type(base.model).__name__
        if not chosen:
            raise ValueError(f"prefix_tuning finds no attention in {model} (on={self.on!r}); take lora")
        for path, block, _ in chosen:
            if not block.supports_attention_interface:
                raise ValueError(
                    f"prefix_tuning cannot enter {path}: {model} computes attention by itself instead of through "
                    "transformers' attention functions; take prompt_tuning or lora"
                )
        return chosen

    def _text(self, base: Anatomy) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of `init_ids` in every attention of a decoder."""
        if not base.causal or base.is_encoder_decoder or self.on != "all":
            raise ValueError("prefix_tuning: init='text' is for decoders with on='all'; take init='random'")
        ids = (self.init_ids * self.length)[: self.length]
        device = next(base.model.parameters()).device
        with torch.no_grad():
            cache = base.model(input_ids=torch.tensor([ids], device=device), use_cache=True).past_key_values
        return [(layer.keys[0].float().clone(), layer.values[0].float().clone()) for layer in cache.layers]

    def _shifts(self, base: Anatomy, kinds: set[str]) -> Iterator[Placed]:
        """Parts that shift the positions of every stack whose self-attention gets a prefix."""
        for stack in (stack for stack in base.stacks if f"{stack.name}.self" in kinds):
            paths = positions(base, stack)
            if not paths:
                raise ValueError(
                    f"prefix_tuning: positions='shifted' needs text with learned or rotary positions, which "
                    f"the {stack.name} of {type(base.model).__name__} has not; take positions='text'"
                )
            for path in paths:
                site = Site(path, role="position", kind="other", parameter=None)
                yield Placed(site, ShiftedPositions(self.length), "shift")


class Tabulation(Rule):
    """Puts the table in the place of the MLP when training is over."""

    def finished(self, run: Run) -> None:
        for name, part in list(run.tuned.named_parts()):
            if isinstance(part, EncodedPrefix):
                run.tuned.exchange(name, part.tabulated())
