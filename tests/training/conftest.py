"""A tokenizer over sixty-four words, for the vocabulary of the tiny models."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *(f"w{number}" for number in range(59))]


def words(length: int, seed: int) -> str:
    """Some words of the vocabulary."""
    chosen = torch.randint(0, 59, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{int(number)}" for number in chosen)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>",
    )  # fmt: skip
