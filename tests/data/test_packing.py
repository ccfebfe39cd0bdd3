"""Packing joins documents and keeps them apart."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.masking_utils import find_packed_sequence_indices

from deltaworks.data import check_packing, load, prepare
from deltaworks.data.packing import PackedCollator, pack
from deltaworks.data.tokens import IGNORED

PAD = 0
documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=30)


def as_dataset(texts):
    return Dataset.from_list([{"input_ids": ids, "labels": [IGNORED, *ids[1:]]} for ids in texts])


@settings(max_examples=40, deadline=None)
@given(documents)
def test_no_token_is_lost_or_doubled_and_documents_stay_whole(texts):
    packed = pack(as_dataset(texts), 12)
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 12
        start = 0
        for length in row["seq_lengths"]:
            document = row["input_ids"][start : start + length]
            assert row["labels"][start : start + length] == [IGNORED, *document[1:]]
            found.append(document)
            start += length
    assert sorted(found) == sorted(texts)


@settings(max_examples=40, deadline=None)
@given(documents, st.sampled_from([None, 8]))
def test_every_document_and_every_padding_is_seen_as_one_of_its_own(texts, multiple):
    packed = pack(as_dataset(texts), 12)
    batch = PackedCollator(PAD, multiple)(list(packed))
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False
    width = batch["input_ids"].shape[1]
    assert multiple is None or width % multiple == 0
    sequence = find_packed_sequence_indices(batch["position_ids"])
    if sequence is None:  # transformers' way of saying that every row is one document
        sequence = torch.zeros_like(batch["position_ids"])
    for row, indices in zip(packed, sequence.tolist(), strict=True):
        expected = [number for number, length in enumerate(row["seq_lengths"]) for _ in range(length)]
        padding = width - len(expected)
        assert indices == expected + [expected[-1] + 1 + i for i in range(padding)]
    assert (batch["labels"][:, 0] == IGNORED).all()


def llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_logits_are_those_of_the_documents_alone(attention):
    model = llama(attention)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 100, (n,), generator=generator).tolist() for n in (5, 1, 7, 3, 1, 9, 2)]
    packed = pack(as_dataset(texts), 12)
    batch = PackedCollator(PAD, 8)(list(packed))
    logits = model(**batch).logits
    for row, values in zip(packed, logits, strict=True):
        start = 0
        for length in row["seq_lengths"]:
            alone = model(input_ids=torch.tensor([row["input_ids"][start : start + length]])).logits[0]
            # Eager attention takes its softmax in float32 whatever the model's precision.
            tolerance = 1e-4 if attention == "eager" else 1e-9
            torch.testing.assert_close(values[start : start + length], alone, rtol=tolerance, atol=tolerance)
            start += length


def test_the_packed_loss_is_the_mean_over_the_same_tokens(decoder_tokenizer):
    rows = [{"prompt": f"question {i}", "completion": " answer" * (i + 1)} for i in range(6)]
    data = load(rows, validation=None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(decoder_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    losses = []
    for packing in (False, True):
        p = prepare(data, "causal-lm", decoder_tokenizer, max_length=40, packing=packing)
        losses.append(model(**p.collator(list(p.train))).loss)
        assert p.packed == packing
    torch.testing.assert_close(losses[0], losses[1])


def test_the_held_out_loss_does_not_depend_on_packing(decoder_tokenizer):
    rows = [{"text": "the answer " * (i + 1)} for i in range(8)]
    data = load(rows, validation=0.5)
    plain, packed = (prepare(data, "causal-lm", decoder_tokenizer, packing=packing) for packing in (False, True))
    assert list(plain.validation["input_ids"]) == list(packed.validation["input_ids"])
    batch = packed.collator(list(packed.validation))
    assert batch["position_ids"].shape == batch["input_ids"].shape


def test_rows_without_their_lengths_are_refused():
    packed = pack(as_dataset([[1, 2], [3]]), 4).remove_columns("seq_lengths")
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        PackedCollator(PAD)(list(packed))


def test_flattened_rows_carry_the_boundaries_for_flash_attention():
    packed = pack(as_dataset([[1, 2, 3], [4, 5], [6]]), 4)
    batch = PackedCollator(PAD, flatten=True)(list(packed))
    assert batch["input_ids"].shape == (1, 6)
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    assert lengths == [length for row in packed for length in row["seq_lengths"]]


def test_documents_longer_than_a_row_are_never_cut_by_packing():
    with pytest.raises(ValueError, match="13 tokens cannot be packed into rows of 12"):
        pack(as_dataset([[1] * 13]), 12)


def test_a_model_in_which_documents_meet_is_found_out():
    for attention in ("eager", "sdpa"):
        check_packing(llama(attention))
        check_packing(llama(attention).bfloat16())
    # Also where weights are so small that documents hardly matter to each other.
    for spread in (0.5, 0.01):
        torch.manual_seed(0)
        config = MambaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=spread
        )  # fmt: skip
        with pytest.raises(ValueError, match="MambaForCausalLM cannot be trained with packing"):
            check_packing(MambaForCausalLM(config))
