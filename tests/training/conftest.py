"""Tiny bases on disk, a tokenizer over sixty-four words for their vocabulary, and data to learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import FAMILIES

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *(f"w{number}" for number in range(59))]


def words(length: int, seed: int) -> str:
    """Some words of the vocabulary."""
    chosen = torch.randint(0, 59, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{int(number)}" for number in chosen)


def made_tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>",
    )  # fmt: skip


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "completions": lambda i: {"prompt": words(4, i), "completion": " " + words(2, i % 3)},
    "classes": lambda i: {"text": f"w{i % 3} w{i % 3 + 5}", "label": ["red", "green", "blue"][i % 3]},
    "several": lambda i: {"text": f"w{i % 3} w{i % 3 + 5}", "label": ["red", "green"][: i % 3]},
    "numbers": lambda i: {"text": f"w{i % 3} w{i % 3 + 5}", "label": i % 3 / 2 + 0.25},
    "tags": lambda i: {"tokens": words(5, i).split(), "tags": ["B-X", "I-X", "O", "O", "O"]},
    "texts": lambda i: {"text": words(9, i)},
    "pairs": lambda i: {"source": words(4, i), "target": words(2, i % 3)},
    "images": lambda i: {"image": [[[i % 3 * 100] * 3] * 16] * 16, "label": i % 3},
}


def prepared_base(folder: Path, family: str) -> str:
    """The folder of a tiny base of a family, in `folder`."""
    place = folder / family
    if not place.exists():
        FAMILIES[family]()[0].save_pretrained(place)
        if family != "vit":
            made_tokenizer().save_pretrained(place)
    return str(place)


def prepared_data(folder: Path, kind: str) -> str:
    """The file of some data, thirty rows, in `folder`."""
    path = folder / f"{kind}.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(ROWS[kind](index)) + "\n" for index in range(30)))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return made_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny base of a family."""
    return partial(prepared_base, tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The file of some data, thirty rows."""
    return partial(prepared_data, tmp_path_factory.mktemp("data"))
