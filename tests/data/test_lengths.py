"""Batches come in few lengths, none above what the data ask for."""

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from deltaworks.data.collate import ChoiceCollator, MaskingCollator, num_supervised_tokens
from deltaworks.data.lengths import StepwiseCollator, longest, stepped
from deltaworks.data.packing import PackedCollator, pack, padding_collator


def rows(*lengths: int) -> list[dict]:
    return [{"input_ids": list(range(1, n + 1)), "labels": [-100, *range(2, n + 1)]} for n in lengths]


def test_steps_are_few_and_near() -> None:
    lengths = [stepped(length) for length in range(1, 4097)]
    assert all(length <= step for length, step in enumerate(lengths, 1))
    assert all(step - length < max(32, length / 8) for length, step in enumerate(lengths, 1))
    assert len(set(lengths)) == 16 + 8 * 3


def test_a_batch_is_padded_to_a_step_but_not_above_the_longest_row() -> None:
    collator = StepwiseCollator(padding_collator(0), bound=70)
    assert collator(rows(20, 33))["input_ids"].shape == (2, 64)
    assert collator(rows(65))["input_ids"].shape == (1, 70)
    assert collator(rows(90))["input_ids"].shape == (1, 90)


def test_padding_is_not_learned_nor_seen() -> None:
    plain, stepwise = padding_collator(0)(rows(20, 33)), StepwiseCollator(padding_collator(0), 512)(rows(20, 33))
    assert num_supervised_tokens(stepwise) == num_supervised_tokens(plain)
    assert torch.equal(stepwise["attention_mask"].sum(1), plain["attention_mask"].sum(1))


def test_packed_rows_keep_their_documents() -> None:
    packed = pack(Dataset.from_list(rows(10, 20, 17)), 40)
    batch = StepwiseCollator(PackedCollator(0), 64)(list(packed))
    assert batch["input_ids"].shape == (2, 64)
    assert longest(packed, None) == 37
    assert batch["position_ids"][0, :37].tolist() == [*range(20), *range(17)]
    assert num_supervised_tokens(batch) == 44


def test_choices_are_as_long_as_the_longest_of_them_not_as_all_together() -> None:
    asked = Dataset.from_list([row | {"lengths": [20, 45], "answer": 0} for row in rows(65, 65)])
    assert longest(asked) == 45
    batch = StepwiseCollator(ChoiceCollator(0), 60)(list(asked))
    assert batch["input_ids"].shape == (4, 60)
    assert batch["attention_mask"].sum(1).tolist() == [20, 45, 20, 45]


def test_masked_texts_and_those_masked_once_are_padded_alike(encoder_tokenizer: PreTrainedTokenizerFast) -> None:
    collator = MaskingCollator(encoder_tokenizer, 0.5, seed=0)
    stepwise = StepwiseCollator(collator, 512)
    texts = [{"input_ids": row["input_ids"]} for row in rows(20, 33)]
    once = [collator.masked_once(text) for text in texts]
    batches = [stepwise(texts), stepwise(once), stepwise(texts)]
    assert [batch["input_ids"].shape for batch in batches] == [(2, 64)] * 3
    assert torch.equal(batches[0]["labels"], batches[2]["labels"]), "the same masks whatever came between"
    assert not (batches[0]["labels"][0, 20:] != -100).any()
