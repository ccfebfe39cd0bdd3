"""What vLLM serves: a plain LoRA with one rank, written from any change that can be merged, and the rules it must keep.

vLLM's rules differ between versions, so they stand here as data: `check_vllm` lists those that a PEFT folder breaks.
`export` writes the file that every version takes: one rank (smaller ones filled with zeros), alpha = rank with every
scale folded into B, no patterns, no biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.experts import PerExpert
from ..core.method import weight_at
from ..core.part import Delta, Part
from ..core.tuned import Tuned
from ..model.weights import CONVOLUTIONS, Weight
from .files import OWN, PEFT_CONFIG, PEFT_WEIGHTS, Replacement, inside, read_json, write_json
from .peft.draft import Draft
from .peft.factors import combined, is_product
from .peft.targets import named
from .recompress import Pair, of_matrix, padded, truncated
from .weights import read_header, write_tensors

NEEDED = ("r", "lora_alpha", "target_modules")
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "lora_bias": (False,),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "use_bdlora": (None,),
    "use_qalora": (False,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
}
"""Keys that must have one of these values, or be absent."""
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the base as it is."""
RECENT = ("rank_pattern", "alpha_pattern")
"""Keys that only recent versions read; older ones take one rank and one alpha for all layers."""
MODULES = frozenset(
    [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "out_proj",
        "fc1",
        "fc2",
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "c_attn",
        "c_proj",
        "c_fc",
        "Wqkv",
        "in_proj",
        "x_proj",
        "dt_proj",
        "embed_tokens",
        "lm_head",
    ]
)
"""Last names of the layers that vLLM's models adapt."""
TENSORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
PREFIX = "base_model.model."


def check_vllm(path: str | Path, *, max_rank: int = 16) -> list[str]:
    """The rules of vLLM that a PEFT folder breaks, one line each; none when it can be served.

    Args:
        path: the folder.
        max_rank: the server's `--max-lora-rank`; 16 without it.

    Raises:
        ValueError, OSError: when the folder's files cannot be read.
    """
    folder = Path(path)
    files = [inside(folder, name) for name in (PEFT_CONFIG, PEFT_WEIGHTS)]
    if files[0] is None or files[1] is None:
        raise FileNotFoundError(f'{folder}: holds no adapter in PEFT\'s format; write one with format="vllm"')
    config, header = read_json(files[0]), read_header(files[1])
    broken = [f"{key} is missing" for key in NEEDED if config.get(key) is None]
    if config.get("peft_type") != "LORA":
        broken.append(f"peft_type={config.get('peft_type')!r}: only LORA is served")
    broken += [
        f"{key}={config[key]!r}: must be {' or '.join(map(repr, allowed))}"
        for key, allowed in PLAIN.items()
        if key in config and config[key] not in allowed
    ]
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        broken.append(f"init_lora_weights={start!r}: expects a changed base")
    broken += [f"{key}: older versions take one value for all layers" for key in RECENT if config.get(key)]
    ranks = [config.get("r"), *dict(config.get("rank_pattern") or {}).values()]
    highest = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    if highest > max_rank:
        broken.append(f"r={highest}: above max_lora_rank={max_rank}; start the server with --max-lora-rank {highest}")
    for name in header:
        end = next((end for end in TENSORS if name.endswith(end)), None)
        if end is None or not name.startswith(PREFIX):
            broken.append(f"tensor {name}: only the factors of layers are read")
        elif (layer := name.removesuffix(end).rpartition(".")[2]) not in MODULES:
            broken.append(f"tensor {name}: {layer} is no layer that vLLM adapts")
    return list(dict.fromkeys(broken))


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the folder.
        rank: the one rank of all layers.
        error: Frobenius norm of what was lost over that of the whole change, 0 to 1, all layers together.
        errors: the same for each layer.
        broken: rules of vLLM that the result breaks all the same (a rank above the server's default, layer names).
    """

    path: Path
    rank: int
    error: float
    errors: dict[str, float]
    broken: list[str]


def export(handle: Tuned, path: str | Path, *, rank: int | None = None, dtype: torch.dtype | None = None) -> Exported:
    """Write any adapter that can be merged as a plain LoRA of one rank.

    Args:
        handle: the adapter.
        path: the folder; an adapter in it is replaced.
        rank: of all layers; without it the smallest that loses nothing, which only changes with factors have.
        dtype: of the tensors; the base's without it.

    Raises:
        ValueError: for what no LoRA can express, naming part and reason.
    """
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"rank={rank!r} is not allowed; it must be a whole number of at least 1")
    draft = Draft(handle)
    by_layer: dict[str, list[Part]] = {}
    for part in draft.parts:
        by_layer.setdefault(part.site.path, []).append(_mergeable(handle, part))
    if draft.values or not by_layer:
        place = ".".join(next(iter(draft.values), ("the model",)))
        raise ValueError(
            f"{draft.method.slug} cannot be exported: {place} is trained itself, and vLLM takes factors only"
        )
    if rank is None:
        rank = max(_own_rank(draft, parts) for parts in by_layer.values())
    pairs = {path: padded(_pair(draft, parts, rank), rank) for path, parts in by_layer.items()}
    dtype = dtype or next(value.dtype for value in draft.model.parameters() if value.is_floating_point())
    for layer, pair in pairs.items():
        embedding = isinstance(draft.model.get_submodule(layer), nn.Embedding)
        for end, value in (("A", pair.a), ("B", pair.b)):
            draft.put(f"{layer}.lora_embedding_{end}" if embedding else f"{layer}.lora_{end}.weight", value.to(dtype))
    config = draft.config(
        "LORA",
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=named(draft.model, list(pairs)),
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=False,
        bias="none",
        modules_to_save=None,
        fan_in_fan_out=draft.conv1d(list(pairs)),
        init_lora_weights=True,
        layers_to_transform=None,
        layers_pattern=None,
    )
    with Replacement(path, OWN) as folder:
        write_json(folder / PEFT_CONFIG, config)
        write_tensors(folder / PEFT_WEIGHTS, draft.tensors)
    lost = sum(pair.error**2 for pair in pairs.values()) ** 0.5
    all_of_it = sum(pair.norm**2 for pair in pairs.values()) ** 0.5
    errors = {layer: pair.error / pair.norm if pair.norm else 0.0 for layer, pair in pairs.items()}
    return Exported(Path(path), rank, lost / all_of_it if all_of_it else 0.0, errors, check_vllm(path))


def _mergeable(handle: Tuned, part: Part) -> Delta:
    """The part, if a LoRA can stand for it."""
    why = None
    layer = handle.model.get_submodule(part.site.path)
    if not isinstance(part, Delta) or not part.mergeable or not handle.method.mergeable:
        why = "is not a change of a weight, and runs beside the base only"
    elif isinstance(part, PerExpert):
        why = "changes experts fused in one parameter, which have no factors of their own there"
    elif part.site.parameter != "weight" or isinstance(layer, CONVOLUTIONS):
        why = "is not at a linear layer or an embedding"
    elif type(part).fold_bias is not Delta.fold_bias and layer._parameters.get("bias") is not None:
        bias = weight_at(handle.model, part.site).bias()
        changed = part.fold_bias(bias)
        if bias is not None and changed is not None and not torch.equal(changed, bias):
            why = "changes a bias as well"
    if why or not isinstance(part, Delta):
        raise ValueError(f"{handle.method.slug} cannot be exported: {type(part).__name__} at {part.site.name} {why}")
    return part


def _own_rank(draft: Draft, parts: list[Part]) -> int:
    if not all(is_product(part) for part in parts):
        raise ValueError(
            f"{draft.method.slug} has no factors at {parts[0].site.name}; give the rank to approximate its change with"
        )
    return combined(draft, parts).rank


@torch.no_grad()
def _pair(draft: Draft, parts: list[Part], rank: int) -> Pair:
    """What the parts of one layer change, as factors of at most this rank."""
    if all(is_product(part) for part in parts):
        factors = combined(draft, parts)
        a, b = factors.a, factors.b * factors.scale
        if factors.rank > rank:
            return truncated(b, a, rank)
        return Pair(a, b, 0.0, float(truncated(b, a, rank).norm))
    whole = Weight(draft.model.get_submodule(parts[0].site.path))
    before = whole.dense()
    after: Tensor = before
    for part in parts:
        assert isinstance(part, Delta)
        own = weight_at(draft.model, part.site)
        rows = after if own.rows is None else after.index_select(0, own.index())
        after = own.replaced(part.fold(rows), after)
    return of_matrix(after - before, min(rank, *before.shape))
