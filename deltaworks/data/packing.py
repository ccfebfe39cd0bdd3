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

    Two short documents are run packed and apart; the second one's logits must be the same.

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
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None].to(device)
    training = model.training
    model.eval()
    try:
        alone = _logits(model, second, torch.arange(6, device=device)[None])
        packed = _logits(model, torch.cat([first, second], dim=1), positions)[:, 5:]
    except TypeError as error:
        raise ValueError(f"{name} cannot be trained with packing: it takes no position ids ({error})") from None
    finally:
        model.train(training)
    # A document that is seen moves logits by about their own size; rounding moves them by a little of it.
    difference = (alone - packed).abs().max() / alone.abs().max().clamp_min(1e-30)
    if not difference < 0.02:
        raise ValueError(
            f"{name} cannot be trained with packing: packed documents see each other in it "
            f"(relative difference of logits {float(difference):.2g}); train without packing"
        )


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
