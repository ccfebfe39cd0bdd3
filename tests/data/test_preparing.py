"""Rows to token ids and labels, for every task."""

import itertools

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deltaworks.data import EpochSampler, epoch_order, load, num_supervised_tokens, prepare
from deltaworks.data.tokens import IGNORED
from tests.data.tokenizers_from_nothing import CHATML, byte_level

TURNS = [
    {"role": "system", "content": "be quick"},
    {"role": "user", "content": "the question"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "lazy"},
]


def learned(tokenizer, example) -> str:
    """The text that the loss counts."""
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


def prepared(rows, task, tokenizer, **options):
    return prepare(load(rows, validation=None), task, tokenizer, **options)


def test_only_the_completion_is_learned_and_it_ends(decoder_tokenizer):
    p = prepared([{"prompt": "the question ", "completion": "the answer"}], "causal-lm", decoder_tokenizer)
    example = p.train[0]
    assert decoder_tokenizer.decode(example["input_ids"]) == "<s>the question the answer</s>"
    assert learned(decoder_tokenizer, example) == "the answer</s>"
    assert p.num_supervised_tokens == sum(label != IGNORED for label in example["labels"])


def test_the_prompt_has_the_tokens_that_generation_starts_from(decoder_tokenizer):
    # "qu" + "ick" is one token when written together.
    whole = decoder_tokenizer("the quick", add_special_tokens=False)["input_ids"]
    start = decoder_tokenizer("the qu", add_special_tokens=False)["input_ids"]
    assert whole[: len(start)] != start
    example = prepared([{"prompt": "the qu", "completion": "ick"}], "causal-lm", decoder_tokenizer).train[0]
    assert example["input_ids"][1 : 1 + len(start)] == start
    assert decoder_tokenizer.decode(example["input_ids"]) == "<s>the quick</s>"
    assert learned(decoder_tokenizer, example) == "ick</s>"


def test_everything_is_learned_when_asked(decoder_tokenizer):
    rows = [{"prompt": "the question ", "completion": "the answer"}]
    example = prepared(rows, "causal-lm", decoder_tokenizer, completion_only=False).train[0]
    assert learned(decoder_tokenizer, example) == "the question the answer</s>"
    assert example["labels"][0] == IGNORED


def test_an_instruction_is_a_chat_where_there_is_a_template(decoder_tokenizer, chat_tokenizer):
    rows = [{"instruction": "the question", "input": "the dog", "output": "the answer"}]
    plain = prepared(rows, "causal-lm", decoder_tokenizer).train[0]
    text = decoder_tokenizer.decode(plain["input_ids"])
    assert text == "<s>### Instruction:\nthe question\n\nthe dog\n\n### Response:\nthe answer</s>"
    chat = prepared(rows, "causal-lm", chat_tokenizer).train[0]
    assert chat_tokenizer.decode(chat["input_ids"]).startswith("<|start|>user\nthe question\n\nthe dog<|end|>")
    assert learned(chat_tokenizer, chat) == "the answer<|end|>"


def test_only_assistant_turns_of_a_chat_are_learned(chat_tokenizer):
    example = prepared([{"messages": TURNS}], "causal-lm", chat_tokenizer).train[0]
    assert example["input_ids"] == chat_tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert learned(chat_tokenizer, example) == "the answer<|end|>lazy<|end|>"


def test_a_turn_of_weight_zero_is_not_learned(chat_tokenizer):
    turns = [*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:]]
    assert (
        learned(chat_tokenizer, prepared([{"messages": turns}], "causal-lm", chat_tokenizer).train[0]) == "lazy<|end|>"
    )


def test_a_template_that_marks_its_answers_is_believed(decoder_tokenizer):
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "<|start|>{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
        "{% else %}<|start|>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>think{% endif %}"
    )
    example = prepared([{"messages": TURNS}], "causal-lm", tokenizer).train[0]
    assert learned(tokenizer, example) == "the answer<|end|>lazy<|end|>"


def test_a_template_that_rewrites_earlier_turns_gives_one_example_per_turn():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ 'question ' }}{% endif %}"
        "{{ m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    train = prepared([{"messages": TURNS}], "causal-lm", tokenizer).train
    assert [learned(tokenizer, e) for e in train] == ["question the answer<|end|>", "question lazy<|end|>"]


def test_a_base_without_template_gets_the_plain_one(decoder_tokenizer):
    example = prepared([{"messages": TURNS[1:3]}], "causal-lm", decoder_tokenizer).train[0]
    assert decoder_tokenizer.decode(example["input_ids"]).startswith("### User:\nthe question\n\n### Assistant:\n")
    assert learned(decoder_tokenizer, example) == "the answer</s>"


def test_a_chat_that_the_template_refuses_is_a_bad_row(chat_tokenizer):
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    rows = [{"messages": TURNS[1:]}, {"messages": TURNS}]
    with pytest.raises(ValueError, match=r"row 2: the tokenizer's chat template refuses these messages \(no system"):
        prepare(load(rows, validation=None), "causal-lm", tokenizer)
    p = prepare(load(rows, validation=None, on_bad_row="skip"), "causal-lm", tokenizer)
    assert (len(p.train), len(p.refused)) == (1, 1)


def test_a_long_prompt_loses_its_beginning_and_never_the_answer(decoder_tokenizer):
    rows = [{"prompt": "the dog " * 40 + "jumps", "completion": " over the lazy fox"}]
    p = prepared(rows, "causal-lm", decoder_tokenizer, max_length=16)
    example = p.train[0]
    assert len(example["input_ids"]) == 16
    assert example["input_ids"][0] == decoder_tokenizer.bos_token_id
    assert learned(decoder_tokenizer, example) == " over the lazy fox</s>"
    assert p.tallies["train"].cut == 1


def test_a_long_answer_keeps_some_prompt_and_is_counted(decoder_tokenizer):
    rows = [{"prompt": "the question", "completion": " the lazy dog" * 30}]
    p = prepared(rows, "causal-lm", decoder_tokenizer, max_length=16)
    assert len(p.train[0]["input_ids"]) == 16
    assert "the question the lazy" in decoder_tokenizer.decode(p.train[0]["input_ids"])
    assert p.tallies["train"].cut == 1


def test_a_chat_of_which_nothing_is_left_to_learn_is_counted_as_dropped(chat_tokenizer):
    long = [{"role": "user", "content": "the dog " * 50}, TURNS[2]]
    p = prepared([{"messages": long}, {"messages": TURNS}], "causal-lm", chat_tokenizer, max_length=64)
    assert len(p.train) == 1
    assert p.tallies["train"].dropped == 1
    with pytest.raises(ValueError, match="no training row has anything to learn"):
        prepared([{"messages": long}], "causal-lm", chat_tokenizer, max_length=64)


def test_a_long_text_is_cut_into_pieces_and_loses_nothing(decoder_tokenizer):
    text = "the quick brown fox " * 20
    p = prepared([{"text": text}], "causal-lm", decoder_tokenizer, max_length=16)
    ids = [token for example in p.train for token in example["input_ids"]]
    assert decoder_tokenizer.decode(ids) == "<s>" + text + "</s>"
    assert all(len(example["input_ids"]) <= 16 for example in p.train)


def test_batches_are_padded_on_the_right_and_count_the_terms_of_the_loss(decoder_tokenizer):
    rows = [{"prompt": "the question", "completion": " yes"}, {"prompt": "the", "completion": " answer no maybe"}]
    p = prepared(rows, "causal-lm", decoder_tokenizer, pad_to_multiple_of=8)
    batch = p.collator(list(p.train))
    assert batch["input_ids"].shape[1] % 8 == 0
    assert (batch["attention_mask"].sum(1).tolist()) == [len(e["input_ids"]) for e in p.train]
    assert num_supervised_tokens(batch) == p.num_supervised_tokens
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_texts_and_pairs_carry_their_class(encoder_tokenizer):
    rows = [{"text": "the dog", "label": "a"}, {"text": "the lazy fox", "label": "b"}]
    p = prepared(rows, "sequence-classification", encoder_tokenizer)
    batch = p.collator(list(p.train))
    assert batch["labels"].tolist() == [0, 1]
    assert batch["labels"].dtype == torch.int64
    assert p.labels.for_config["id2label"] == {0: "a", 1: "b"}
    assert p.num_supervised_tokens == 2
    pair = prepared(
        [{"premise": "the dog", "hypothesis": "jumps", "label": 0}], "sequence-classification", encoder_tokenizer
    )
    assert encoder_tokenizer.decode(pair.train[0]["input_ids"]) == "[CLS] the dog [SEP] jumps [SEP]"


def test_several_classes_become_a_multi_hot_vector(encoder_tokenizer):
    rows = [{"text": "the", "label": ["x", "z"]}, {"text": "dog", "label": ["y"]}]
    batch = (p := prepared(rows, "sequence-classification", encoder_tokenizer)).collator(list(p.train))
    assert batch["labels"].tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert p.labels.problem_type == "multi_label_classification"


def test_numbers_stay_numbers_and_number_classes_can_be_made_numbers(encoder_tokenizer):
    p = prepared([{"text": "the", "label": 0.5}], "sequence-classification", encoder_tokenizer)
    assert p.collator(list(p.train))["labels"].dtype == torch.float32
    rows = [{"text": "the", "label": 5}, {"text": "dog", "label": 3}]
    p = prepared(rows, "regression", encoder_tokenizer)
    assert p.collator(list(p.train))["labels"].tolist() == [5.0, 3.0]
    with pytest.raises(ValueError, match="regression needs numbers; the labels are a"):
        prepared([{"text": "the", "label": "a"}], "regression", encoder_tokenizer)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_word_carries_its_tag_on_its_first_sub_word(kind, encoder_tokenizer, decoder_tokenizer):
    tokenizer = encoder_tokenizer if kind == "encoder" else decoder_tokenizer
    words, tags = ["the", "zebra", "jumps"], ["D", "N", "V"]
    p = prepared([{"tokens": words, "tags": tags}], "token-classification", tokenizer)
    example = p.train[0]
    tagged = [(i, p.labels.names[label]) for i, label in enumerate(example["labels"]) if label != IGNORED]
    assert [tag for _, tag in tagged] == tags
    starts = [i for i, _ in tagged] + [len(example["labels"])]
    pieces = [
        tokenizer.decode(example["input_ids"][a:b], skip_special_tokens=True).strip()
        for a, b in itertools.pairwise(starts)
    ]
    assert pieces == words
    assert len(example["input_ids"]) > len(words) + 1


def test_an_empty_word_moves_no_tag(encoder_tokenizer):
    rows = [{"tokens": ["", "the", "dog"], "tags": ["X", "D", "N"]}]
    p = prepared(rows, "token-classification", encoder_tokenizer)
    assert [p.labels.names[label] for label in p.train[0]["labels"] if label != IGNORED] == ["D", "N"]


def test_sources_and_targets_are_apart(encoder_tokenizer):
    rows = [{"source": "the quick fox", "target": "dog"}, {"source": "the", "target": "lazy dog"}]
    p = prepared(rows, "seq2seq", encoder_tokenizer)
    assert encoder_tokenizer.decode(p.train[0]["labels"]) == "[CLS] dog [SEP]"
    batch = p.collator(list(p.train))
    assert batch["labels"][0, -1] == IGNORED
    assert num_supervised_tokens(batch) == p.num_supervised_tokens


def test_targets_end_where_the_tokenizer_adds_no_end(decoder_tokenizer):
    p = prepared([{"source": "the", "target": "dog"}], "seq2seq", decoder_tokenizer)
    assert p.train[0]["labels"][-1] == decoder_tokenizer.eos_token_id


def test_masks_are_a_function_of_seed_epoch_and_batch(encoder_tokenizer):
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * 4}]
    p, q = (prepared(rows, "masked-lm", encoder_tokenizer, seed=1) for _ in range(2))
    batch = p.collator(list(p.train))
    p.collator(list(p.train))
    assert torch.equal(p.collator(list(p.train))["input_ids"], batch["input_ids"])
    assert torch.equal(q.collator(list(q.train))["input_ids"], batch["input_ids"])
    q.collator.set_epoch(1)
    assert not torch.equal(q.collator(list(q.train))["input_ids"], batch["input_ids"])
    masked = batch["labels"] != IGNORED
    assert 0 < masked.sum() < masked.numel() / 2
    original = torch.tensor(p.train["input_ids"])
    assert torch.equal(torch.where(masked, batch["labels"], batch["input_ids"]), original)


def test_held_out_masks_do_not_change_with_the_epoch(encoder_tokenizer):
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * 4} for _ in range(4)]
    p = prepare(load(rows, validation=0.5), "masked-lm", encoder_tokenizer)
    first = p.collator(list(p.validation))
    p.collator.set_epoch(5)
    again = p.collator(list(p.validation))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert (first["labels"] != IGNORED).any()


def test_masking_needs_a_mask_token(decoder_tokenizer):
    with pytest.raises(ValueError, match="mask token"):
        prepared([{"text": "the"}], "masked-lm", decoder_tokenizer)


def test_images_become_pixels_of_the_bases_size():
    rows = [
        {"image": np.full((8, 8), 255, dtype=np.uint8), "label": "light"},
        {"image": np.zeros((6, 4, 3)), "label": "dark"},
    ]
    p = prepared(rows, "image-classification", None, image_size=16, channels=3)
    batch = p.collator(list(p.train))
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["pixel_values"][0].unique().tolist() == [1.0]
    assert batch["pixel_values"][1].unique().tolist() == [-1.0]
    assert batch["labels"].tolist() == [1, 0]


def test_a_processor_is_used_where_there_is_one():
    pytest.importorskip("PIL")
    from transformers import ViTImageProcessor

    rows = [{"image": np.full((8, 8), 255, dtype=np.uint8), "label": 0}]
    processor = ViTImageProcessor(size={"height": 12, "width": 12})
    p = prepared(rows, "image-classification", processor)
    assert p.collator(list(p.train))["pixel_values"].shape == (1, 3, 12, 12)


def test_task_and_data_must_go_together(decoder_tokenizer):
    with pytest.raises(ValueError, match=r"token-classification learns from tokens-tags, the data are text; such data"):
        prepared([{"text": "the"}], "token-classification", decoder_tokenizer)
    with pytest.raises(ValueError, match="task is 'nonsense'; known are causal-lm"):
        prepared([{"text": "the"}], "nonsense", decoder_tokenizer)
    with pytest.raises(ValueError, match="at least 8"):
        prepared([{"text": "the"}], "causal-lm", decoder_tokenizer, max_length=2)


def test_an_epochs_order_depends_on_seed_and_epoch_only():
    assert epoch_order(50, 1, 2) == epoch_order(50, 1, 2)
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    sampler = EpochSampler(50, seed=1)
    sampler.set_epoch(2)
    assert list(sampler) == epoch_order(50, 1, 2)


def tiny_llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("packing", [False, True])
def test_a_trainer_takes_what_is_prepared(tmp_path, decoder_tokenizer, packing):
    rows = [{"prompt": f"the question {i}", "completion": " the answer" * (i % 3 + 1)} for i in range(12)]
    data = load(rows, validation=0.25)
    p = prepare(data, "causal-lm", decoder_tokenizer, max_length=48, packing=packing)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no", **p.arguments,
    )  # fmt: skip
    trainer = Trainer(
        tiny_llama(decoder_tokenizer), arguments, train_dataset=p.train, eval_dataset=p.validation,
        data_collator=p.collator, callbacks=p.callbacks,
    )  # fmt: skip
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_masks_of_a_resumed_run_are_those_of_the_run_that_went_on(tmp_path, encoder_tokenizer):
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "and",
        "the",
        "question",
        "is",
        "what",
    ]
    rows = [{"text": " ".join(words[i % 7 :] + words)} for i in range(12)]
    seen: list[torch.Tensor] = []
    epoch = torch.zeros(())

    def run(steps, checkpoint=None):
        seen.clear()
        p = prepared(rows, "masked-lm", encoder_tokenizer)
        nonlocal epoch
        epoch = p.collator.epoch

        def watched(examples):
            batch = p.collator(examples)
            seen.append(batch["input_ids"])
            return batch

        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            report_to="none", disable_tqdm=True, use_cpu=True, save_steps=4, **p.arguments,
        )  # fmt: skip
        torch.manual_seed(0)
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=len(encoder_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2,
            )
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=p.train, data_collator=watched, callbacks=p.callbacks)
        trainer.train(resume_from_checkpoint=checkpoint)
        return list(seen)

    whole = run(8)  # three update steps an epoch, so that step 4 is in the middle of the second
    assert int(epoch) == 2
    resumed = run(8, str(tmp_path / "checkpoint-4"))
    assert len(resumed) < len(whole)
    # Resumed after 4 steps of two batches each; both runs read the same number of batches ahead.
    assert all(torch.equal(a, b) for a, b in zip(whole[8:], resumed, strict=True))


def test_trls_trainers_take_what_is_prepared(tmp_path, chat_tokenizer):
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    p = prepared([{"messages": TURNS}] * 4, "causal-lm", chat_tokenizer, max_length=48, packing=True)
    shared = {
        "max_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
    }
    trainer = SFTTrainer(
        tiny_llama(chat_tokenizer), SFTConfig(str(tmp_path), **shared | p.arguments),
        train_dataset=p.train, data_collator=p.collator, processing_class=chat_tokenizer,
    )  # fmt: skip
    assert trainer.train().training_loss > 0

    pairs = [{"prompt": TURNS[:2], "chosen": TURNS[2:3], "rejected": TURNS[4:]}] * 4
    preferred = prepared(pairs, "preference", chat_tokenizer)
    judge = DPOTrainer(
        tiny_llama(chat_tokenizer), ref_model=tiny_llama(chat_tokenizer), args=DPOConfig(str(tmp_path), **shared),
        train_dataset=preferred.train, processing_class=chat_tokenizer,
    )  # fmt: skip
    assert judge.train().training_loss > 0
