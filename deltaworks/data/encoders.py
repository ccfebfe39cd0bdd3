"""Token ids and labels for the tasks that are not causal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bad_rows import Unfit
from .formats import Row
from .labels import Labels
from .tokens import IGNORED, CausalEncoder, Tally, Tokenizer, special_around

Encode = Callable[[Row, Tally], list[dict[str, Any]]]


def sequence_classification(
    tokenizer: Tokenizer,
    max_length: int | None,
    labels: Labels,
    value: Callable[[Any], float] | None = None,
) -> Encode:
    """A text, or a pair, with a class id, a multi-hot vector or numbers under `labels`.

    - `value`: turns a stored label into a number first.
    """

    def encode(row: Row, tally: Tally) -> list[dict[str, Any]]:
        tally.rows += 1
        example = _encoded(tokenizer, max_length, tally, row["text"], row.get("text_pair"))
        label: Any = row["label"] if value is None else value(row["label"])
        if labels.problem_type == "multi_label_classification":
            label = [float(index in label) for index in range(labels.num_labels)]
        return [example | {"labels": label}]

    return encode


def token_classification(tokenizer: Tokenizer, max_length: int | None) -> Encode:
    """Words joined by blanks, so that sub-words are those of running text; a word's first sub-word carries its tag.

    **Raises:** `ValueError` when the tokenizer cannot tell where its tokens stand in the text.
    """
    if not tokenizer.is_fast:
        raise ValueError("token classification needs a tokenizer that knows character offsets (tokenizer.is_fast)")

    def encode(row: Row, tally: Tally) -> list[dict[str, Any]]:
        tally.rows += 1
        word_at: list[int | None] = []
        for index, word in enumerate(row["tokens"]):
            word_at += [None] * (index > 0) + [index] * len(word)
        text = " ".join(row["tokens"])
        example = _encoded(tokenizer, max_length, tally, text, return_offsets_mapping=True)
        seen: set[int] = set()
        labels = []
        for start, stop in example.pop("offset_mapping"):
            # A sub-word may begin with the blank before its word; its last character is the word's.
            word = word_at[stop - 1] if stop > start else None
            labels.append(IGNORED if word is None or word in seen else row["tags"][word])
            if word is not None:
                seen.add(word)
        if not seen:
            tally.dropped += 1
            return []
        return [example | {"labels": labels}]

    return encode


def seq2seq(tokenizer: Tokenizer, max_length: int | None) -> Encode:
    """A source for the encoder and a target for the decoder; instructions and prompts are sources as well."""

    def encode(row: Row, tally: Tally) -> list[dict[str, Any]]:
        tally.rows += 1
        if "instruction" in row:
            source, target = "\n\n".join(filter(str.strip, (row["instruction"], row["input"]))), row["output"]
        elif "source" in row:
            source, target = row["source"], row["target"]
        else:
            source, target = row["prompt"], row["completion"]
        example = _encoded(tokenizer, max_length, tally, source)
        labels: Any = tokenizer(text_target=target)["input_ids"]
        ends = tokenizer.eos_token_id
        # Without an end the decoder never learns to stop; BERT-like tokenizers end with their own token already.
        if ends is not None and not {*labels[-1:]} & {ends, tokenizer.sep_token_id}:
            labels = [*labels, ends]
        if not labels:
            raise Unfit("the tokenizer makes no token of this target")
        if max_length is not None and len(labels) > max_length:
            labels = labels[:max_length]
            tally.cut += 1
        return [example | {"labels": labels}]

    return encode


def multiple_choice(tokenizer: Tokenizer, max_length: int | None) -> Encode:
    """A prompt with each of its choices behind it: sequences end to end, of which only the choices have labels.

    `input_ids` and `labels` are as long as all of them together, `lengths` says how long each is, and `answer` which
    one is right.
    """
    causal = CausalEncoder(tokenizer, max_length)

    def encode(row: Row, tally: Tally) -> list[dict[str, Any]]:
        one = Tally()
        parts = [causal({"prompt": row["prompt"], "completion": text}, one) for text in row["choices"]]
        tally.rows += 1
        tally.cut += one.cut > 0
        if one.dropped:
            raise Unfit("the tokenizer makes no token of a choice")
        sequences = [example for (example,) in parts]
        return [{
            "input_ids": [token for sequence in sequences for token in sequence["input_ids"]],
            "labels": [label for sequence in sequences for label in sequence["labels"]],
            "lengths": [len(sequence["input_ids"]) for sequence in sequences],
            "answer": row["answer"],
        }]  # fmt: skip

    return encode


def masked_lm(tokenizer: Tokenizer, max_length: int | None) -> Encode:
    """A text in pieces of at most `max_length`, no token lost; masks are drawn when batches are made.

    **Raises:** `ValueError` when the tokenizer has no mask token.
    """
    if tokenizer.mask_token is None:
        raise ValueError("masked-lm needs a tokenizer with a mask token; this base's has none (use task causal-lm)")
    before, after = special_around(tokenizer)

    def encode(row: Row, tally: Tally) -> list[dict[str, Any]]:
        tally.rows += 1
        ids: Any = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        step = (max_length or len(ids) + len(before) + len(after)) - len(before) - len(after)
        pieces = [ids[start : start + step] for start in range(0, len(ids), max(step, 1))]
        tally.dropped += not pieces
        return [
            {
                "input_ids": before + piece + after,
                "special_tokens_mask": [1] * len(before) + [0] * len(piece) + [1] * len(after),
            }
            for piece in pieces
        ]

    return encode


def _encoded(
    tokenizer: Tokenizer, max_length: int | None, tally: Tally, text: str, *pair: str | None, **more: Any
) -> dict[str, Any]:
    """`input_ids` (and `token_type_ids` where the base has them) of at most `max_length`; cuts are counted."""
    given = (text, *(part for part in pair if part is not None))
    whole: Any = tokenizer(*given, return_attention_mask=False, **more)
    if max_length is not None and len(whole["input_ids"]) > max_length:
        tally.cut += 1
        whole = tokenizer(*given, truncation=True, max_length=max_length, return_attention_mask=False, **more)
    if not whole["input_ids"]:
        raise Unfit("the tokenizer makes no token of this text")
    return dict(whole)
