"""Batches: padding to the longest row, masks for masked language modelling, pixels for images."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
)

from .images import decode, to_pixels
from .order import mixed
from .tokens import IGNORED, Tokenizer


def num_supervised_tokens(batch: dict[str, Any]) -> int:
    """How many terms the loss of a batch has: labels that are not -100."""
    return int((batch["labels"] != IGNORED).sum())


class MaskingCollator:
    """Masks anew in every epoch, as a pure function of seed, epoch and batch, so that resumed runs mask alike.

    The masking itself (80 % mask token, 10 % random, 10 % kept; Devlin et al. 2018, arXiv:1810.04805) is
    `transformers`'. The epoch lies in shared memory, where data loader workers see it.
    """

    def __init__(self, tokenizer: Tokenizer, probability: float, seed: int, pad_to_multiple_of: int | None = None):
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.masking = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=probability, pad_to_multiple_of=pad_to_multiple_of
        )
        self.padding = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    @property
    def pad_to_multiple_of(self) -> int | None:
        return self.masking.pad_to_multiple_of

    @pad_to_multiple_of.setter
    def pad_to_multiple_of(self, multiple: int | None) -> None:
        self.masking.pad_to_multiple_of = self.padding.pad_to_multiple_of = multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def masked(self, rows: Sequence[dict[str, Any]], epoch: int) -> dict[str, Any]:
        """The batch of these rows in this epoch: `input_ids`, `attention_mask`, `labels`."""
        content = zlib.crc32(repr([row["input_ids"] for row in rows]).encode())
        self.masking.generator = torch.Generator().manual_seed(mixed(self.seed, epoch, content))
        return dict(self.masking.torch_call(list(rows)))

    def masked_once(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row masked for good, as held-out rows are: batches of such rows are only padded."""
        batch = self.masked([row], 0)
        length = len(row["input_ids"])
        return {name: batch[name][0, :length].tolist() for name in ("input_ids", "labels")}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "labels" in rows[0]:
            return dict(self.padding.torch_call(list(rows)))
        return self.masked(rows, int(self.epoch))


class ChoiceCollator:
    """Questions with their choices, a sequence each, padded on the right.

    `input_ids`, `attention_mask` and `labels` are sequences x length; `question` says which question of the batch a
    sequence belongs to, `right` whether it is the right choice. Those of a question follow each other.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(max(row["lengths"]) for row in rows) // multiple) * multiple
        count = sum(len(row["lengths"]) for row in rows)
        ids = torch.full((count, length), self.pad_token_id)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        question, right = torch.empty(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
        place = 0
        for number, row in enumerate(rows):
            right[place + row["answer"]] = True
            start = 0
            for size in row["lengths"]:
                ids[place, :size] = torch.tensor(row["input_ids"][start : start + size])
                labels[place, :size] = torch.tensor(row["labels"][start : start + size])
                mask[place, :size] = 1
                question[place] = number
                place, start = place + 1, start + size
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "question": question, "right": right}


class ImageCollator:
    """Decodes, resizes and normalises: `pixel_values` (batch x channels x height x width) and `labels`.

    - `processor`: the base's image processor; `None` for `images.to_pixels`.
    - `size`, `channels`: what the base takes; used without a processor.
    """

    def __init__(self, processor: Any, size: tuple[int, int], channels: int, classes: int | None):
        self.processor = processor
        self.size = size
        self.channels = channels
        self.classes = classes

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        images = [decode(row["image"]) for row in rows]
        if self.processor is None:
            pixels = torch.stack([to_pixels(image, self.size, self.channels) for image in images])
        else:
            whole = [np.repeat(np.uint8(np.rint(i * 255)), 3 if i.shape[2] == 1 else 1, axis=2) for i in images]
            pixels = self.processor(images=whole, return_tensors="pt", input_data_format="channels_last")[
                "pixel_values"
            ]
        labels = [row["label"] for row in rows]
        if self.classes is not None:
            labels = [[float(index in label) for index in range(self.classes)] for label in labels]
        return {"pixel_values": pixels, "labels": torch.tensor(labels)}
