"""Packing: several documents in one sequence, none of which sees another.

Rows are filled best-fit decreasing (Ding et al. 2024, arXiv:2404.10830; TRL's `pack_dataset`), so that documents stay
whole. A packed batch has no attention mask. It has `position_ids` that start again at 0 with every document, from which
`transformers` (>= 5) makes a block-diagonal causal mask for eager, SDPA and flex attention. It does so only without
a key-value cache, therefore the batch says `use_cache=False`. Flash attention reads the same boundaries from one
flattened row (`flatten=True`). Padding has position 0 throughout: every padding token is a document of its own.

An architecture that carries state from token to token (Mamba), or that takes no position ids, lets documents see each
other; `check_packing` finds out by trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn

if TYPE_CHECKING:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


def padding_collator(
    pad_token_id: int, pad_to_multiple_of: int | None = None, **options: Any
) -> DataCollatorForLanguageModeling:
    """TRL's collator for causal language models; it pads on the right, so that positions are right without a mask."""
    # Imported when used: TRL takes longer to import than all of the reading and checking of data together.
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id, pad_to_multiple_of=pad_to_multiple_of, **options)


def pack(examples: Dataset, max_length: int) -> Dataset:
    """Joins examples with `input_ids` and `labels` into rows of at most `max_length`, with `seq_lengths` per row.

    **Raises:** `ValueError` when an example is longer than `max_length`, which packing would cut.
    """
    from trl.data_utils import pack_dataset

    longest = max((len(ids) for ids in examples["input_ids"]), default=0)
    if longest > max_length:
        raise ValueError(f"an example of {longest} tokens cannot be packed into rows of {max_length}")
    together = {"batch_size": max(len(examples), 1), "desc": "packing"}
    return pack_dataset(examples, max_length, strategy="bfd", map_kwargs=together)


@dataclass
class PackedCollator:
    """Batches of packed rows: `input_ids`, `labels`, `position_ids` (each batch x length), and `use_cache=False`.

    - `flatten`: all rows of a batch in one, as flash attention needs it.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    flatten: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if any("seq_lengths" not in row for row in rows):
            raise ValueError(
                "packed rows came without seq_lengths, so their documents would see each other; "
                "give the trainer remove_unused_columns=False"
            )
        collator = padding_collator(
            self.pad_token_id, self.pad_to_multiple_of, padding_free=self.flatten, return_position_ids=True
        )
        batch = collator.torch_call(list(rows))
        batch.pop("attention_mask", None)
        return batch | {"use_cache": False}


@torch.no_grad()
def check_packing(model: nn.Module, vocabulary: int | None = None) -> None:
    """Makes sure that in this model packed documents do not see each other.

    Two short documents are run packed, as one document, and apart. Packed, the second one's logits must be those it has
    alone, and not be moved towards those it has when it sees the first.

    **Arguments:**

    - `model`: a causal language model.
    - `vocabulary`: how many token ids there are; the input embedding's rows when not given.

    **Raises:** `ValueError` that names the model's class.
    """
    name = type(model).__name__
    if vocabulary is None:
        embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        vocabulary = int(embedding.weight.shape[0])  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocabulary, (1, length), generator=generator).to(device) for length in (5, 6))
    both = torch.cat([first, second], dim=1)
    apart, together = torch.cat([torch.arange(5), torch.arange(6)]).to(device), torch.arange(11, device=device)
    training = model.training
    model.eval()
    try:
        alone = _logits(model, second, together[None, :6])
        packed = _logits(model, both, apart[None])[:, 5:]
        seeing = _logits(model, both, together[None])[:, 5:]
    except TypeError as error:
        raise ValueError(f"{name} cannot be trained with packing: it takes no position ids ({error})") from None
    finally:
        model.train(training)
    leak, whole_leak = float((packed - alone).abs().max()), float((seeing - alone).abs().max())
    # Rounding moves logits by far less than a tenth of what a document that is seen does, in bfloat16 too.
    if not leak <= max(0.1 * whole_leak, 1e-6 * float(alone.abs().max())):
        raise ValueError(
            f"{name} cannot be trained with packing: packed documents see each other in it (logits move by {leak:.2g}, "
            f"by {whole_leak:.2g} in one document); train without packing"
        )


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
