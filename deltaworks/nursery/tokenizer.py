"""The nursery's tokenizer: byte-level BPE with 4096 entries, learnt from the training side of the corpus.

One vocabulary serves every text base; only what is put around a text differs with the kind of base.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 512

PAD, BOS, EOS, MASK = "<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SENTINELS = [f"<|extra_{index}|>" for index in range(16)]
SPECIAL = [PAD, BOS, EOS, MASK, SYSTEM, USER, ASSISTANT, END, *SENTINELS]
PAD_ID, BOS_ID, EOS_ID, MASK_ID = (SPECIAL.index(token) for token in (PAD, BOS, EOS, MASK))

IN_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
"""What every model's config has to know of the vocabulary."""

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- else %}{{- '<|end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)

Framing = Literal["causal", "masked", "seq2seq"]


def train(texts: Iterable[str]) -> Tokenizer:
    """Learn the vocabulary from `texts`. Deterministic for the same texts in the same order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def framed(tokenizer: Tokenizer, framing: Framing) -> PreTrainedTokenizerFast:
    """The tokenizer as a base of one kind wants it.

    `causal` writes `<|bos|> text`, `masked` writes `<|bos|> text <|eos|>` (a pair: `<|bos|> a <|eos|> b <|eos|>`) and
    `seq2seq` writes `text <|eos|>`.
    """
    bos, eos = (BOS, BOS_ID), (EOS, EOS_ID)
    single, pair, used = {
        "causal": (f"{BOS} $A", f"{BOS} $A $B:1", [bos]),
        "masked": (f"{BOS} $A {EOS}", f"{BOS} $A {EOS} $B:1 {EOS}:1", [bos, eos]),
        "seq2seq": (f"$A {EOS}", f"$A {EOS} $B:1 {EOS}:1", [eos]),
    }[framing]
    own = Tokenizer.from_str(tokenizer.to_str())
    own.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=single, pair=pair, special_tokens=used),
        ]
    )
    extra = {"cls_token": BOS, "sep_token": EOS} if framing == "masked" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT, END, *SENTINELS],
        model_max_length=CONTEXT,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        **extra,
    )
