"""From canonical rows to token ids and labels, one function per kind of row.

A label is a token id where the loss counts and -100 elsewhere. The first label of a causal sequence is always -100:
nothing precedes that token in its own document, and in a packed sequence the document before must not predict it. So
the number of labels that are not -100 is exactly the number of terms in the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from .bad_rows import Unfit
from .formats import Row

IGNORED = -100

Tokenizer = Any
"""A `transformers.PreTrainedTokenizerBase`; its annotations are unions over every way of calling it."""

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""How chats are rendered for a base whose tokenizer has no chat template of its own."""


@dataclass
class Tally:
    """What became of the rows of one split.

    - `rows`: canonical rows; `examples`: what they became (long texts give several, packing joins many).
    - `tokens`, `supervised`: all tokens, and those the loss counts.
    - `cut`: rows that lost tokens to `max_length`.
    - `dropped`: rows of which nothing was left that could be learned.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    cut: int = 0
    dropped: int = 0


Example = dict[str, list[int]]


def with_padding(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, or a copy that pads with the end-of-text token when it has no padding token.

    **Raises:** `ValueError` when it has neither.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer
    if tokenizer.eos_token is None:
        raise ValueError("the base's tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class CausalEncoder:
    """Token ids and labels for a decoder.

    **Arguments:**

    - `tokenizer`: the base's.
    - `max_length`: longest example in tokens; `None` for no bound.
    - `completion_only`: the loss counts completions and assistant turns only; otherwise every token.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int | None, completion_only: bool = True):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.completion_only = completion_only
        # What the tokenizer puts after a text belongs to encoders; a decoder's text goes on.
        self.before, _ = special_around(tokenizer)
        self.end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.chat_template = _chat_template(tokenizer)

    def __call__(self, row: Row, tally: Tally) -> list[Example]:
        """The examples a canonical row gives: none when nothing of it can be learned, several for a long text."""
        tally.rows += 1
        if "text" in row:
            examples = self._text(row["text"])
        elif "messages" in row:
            examples = self._chat(row["messages"], tally)
        elif "instruction" in row:
            examples = self._instruction(row, tally)
        else:
            prompt, completion = ("source", "target") if "source" in row else ("prompt", "completion")
            examples = self._completion(row[prompt], row[completion], tally)
        for example in examples:
            example["labels"][0] = IGNORED
        kept = [example for example in examples if any(label != IGNORED for label in example["labels"])]
        tally.dropped += not kept
        return kept

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, text: str) -> list[Example]:
        """A text in pieces of at most `max_length`, no token lost."""
        ids = self.before + self._ids(text)
        if ids[-1:] != self.end:
            ids = ids + self.end
        step = self.max_length or len(ids)
        pieces = [ids[start : start + step] for start in range(0, len(ids), step)]
        return [{"input_ids": piece, "labels": list(piece)} for piece in pieces]

    def _instruction(self, row: Row, tally: Tally) -> list[Example]:
        given = row["instruction"] + ("\n\n" + row["input"] if row["input"].strip() else "")
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": given}, {"role": "assistant", "content": row["output"]}]
            return self._chat(turns, tally)
        return self._completion(f"### Instruction:\n{given}\n\n### Response:\n", row["output"], tally)

    def _completion(self, prompt: str, completion: str, tally: Tally) -> list[Example]:
        """Prompt and completion as one sequence whose prompt tokens are those that generation will start from.

        Tokenised together when that leaves the prompt's tokens as they are; when a token would reach across the
        boundary (which generation could never produce), the two are tokenised apart.
        """
        prompt_ids = self._ids(prompt)
        together = self._ids(prompt + completion)
        if together[: len(prompt_ids)] == prompt_ids:
            answer = together[len(prompt_ids) :]
        else:
            answer = self._ids(completion)
        if answer[-1:] != self.end:
            answer = answer + self.end
        prompt_ids, answer = self._fit(prompt_ids, answer, tally)
        ids = self.before + prompt_ids + answer
        unsupervised = len(ids) - len(answer) if self.completion_only else 0
        return [{"input_ids": ids, "labels": [IGNORED] * unsupervised + ids[unsupervised:]}]

    def _fit(self, prompt: list[int], answer: list[int], tally: Tally) -> tuple[list[int], list[int]]:
        """Cuts the beginning of the prompt first, and the end of the answer only when half the room is not enough."""
        if self.max_length is None or len(self.before) + len(prompt) + len(answer) <= self.max_length:
            return prompt, answer
        tally.cut += 1
        room = max(self.max_length - len(self.before), 1)
        for_prompt = max(room - len(answer), min(len(prompt), room // 2))
        return prompt[len(prompt) - for_prompt :], answer[: room - for_prompt]

    def _chat(self, messages: Sequence[Mapping[str, Any]], tally: Tally) -> list[Example]:
        ids, spans = self._spans(messages)
        if spans is None:
            # The template writes earlier turns differently once later ones follow, so a whole conversation is not what
            # the model sees while it writes an early turn: each turn becomes an example with its own past.
            turns = [index for index in range(len(messages)) if _trained(messages[index])]
            examples = [self._last_turn(messages[: index + 1]) for index in turns]
        else:
            examples = [self._labelled(ids, spans)]
        cut = [self._shortened(example) for example in examples]
        tally.cut += cut != examples
        return cut

    def _labelled(self, ids: list[int], spans: Sequence[tuple[int, int]]) -> Example:
        if not self.completion_only:
            return {"input_ids": ids, "labels": list(ids)}
        labels = [IGNORED] * len(ids)
        for start, stop in spans:
            labels[start:stop] = ids[start:stop]
        return {"input_ids": ids, "labels": labels}

    def _shortened(self, example: Example) -> Example:
        return {name: values[: self.max_length] for name, values in example.items()}

    def _render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> list[int]:
        return self._ids(self._rendered_text(messages, prompt))

    def _rendered_text(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        turns = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise Unfit(f"the tokenizer's chat template refuses these messages ({error})") from None

    def _spans(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Token ids of a conversation and the spans of its trained turns; no spans when turns are not prefixes."""
        ids = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if not _trained(message):
                continue
            start = self._render(messages[:index], prompt=True)
            through = ids if index + 1 == len(messages) else self._render(messages[: index + 1])
            if ids[: len(start)] != start or ids[: len(through)] != through or len(through) <= len(start):
                marked = self._marked(messages)
                return (ids, None) if marked is None else marked
            spans.append((len(start), self._without_tail(ids, len(start), len(through))))
        return self._ended(ids, spans)

    def _marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[tuple[int, int]]] | None:
        """The spans that the template itself marks with `{% generation %}`, when it does."""
        from trl.chat_template_utils import has_generation_markers

        if not has_generation_markers(self.chat_template) or any(m.get("weight") == 0 for m in messages):
            return None
        turns = [dict(message) for message in messages]
        encoded = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask: list[int] = encoded["assistant_masks"]
        ids: list[int] = encoded["input_ids"]
        spans = [(index, index + 1) for index, marked in enumerate(mask) if marked]
        return (ids, spans) if spans else None

    def _last_turn(self, messages: Sequence[Mapping[str, Any]]) -> Example:
        """A conversation that ends with the turn to learn.

        **Raises:** `Unfit` when the template writes that turn otherwise than it prompts for one.
        """
        ids = self._render(messages)
        start = self._render(messages[:-1], prompt=True)
        if ids[: len(start)] != start:
            text, prompt = self._rendered_text(messages), self._rendered_text(messages[:-1], prompt=True)
            if not text.startswith(prompt):
                raise Unfit(
                    "the tokenizer's chat template writes an answer otherwise than it prompts for one "
                    f"(…{prompt[-30:]!r}), so its tokens are not known; use a template with {{% generation %}} marks"
                )
            # A token would reach across the boundary, which generation can never produce.
            ids = start + self._ids(text[len(prompt) :])
        ids, spans = self._ended(ids, [(len(start), self._without_tail(ids, len(start), len(ids)))])
        return self._labelled(ids, spans)

    def _without_tail(self, ids: list[int], start: int, stop: int) -> int:
        """Where a turn really ends: blanks after an end-of-turn token are written by the template, not the model."""
        special = set(self.tokenizer.all_special_ids)
        end = stop
        while end > start and ids[end - 1] not in special and not self.tokenizer.decode([ids[end - 1]]).strip():
            end -= 1
        return end if end > start and ids[end - 1] in special else stop

    def _ended(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """With an end-of-text token after a last turn that the template leaves open, so that answers end."""
        special = set(self.tokenizer.all_special_ids)
        if self.end and spans and spans[-1][1] == len(ids) and ids[-1] not in special:
            return ids + self.end, [*spans[:-1], (spans[-1][0], len(ids) + 1)]
        return ids, spans


def _trained(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def special_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    full: Any = tokenizer("a")["input_ids"]
    bare: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start]), list(full[start + len(bare) :])
    return [], []


def _chat_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's template, where TRL knows it made fit for training, or the plain one."""
    if tokenizer.chat_template is None:
        return PLAIN_CHAT_TEMPLATE
    from trl.chat_template_utils import get_training_chat_template

    try:
        # TRL's own check renders tool calls, which many templates cannot.
        return get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
    except Exception:
        return tokenizer.get_chat_template()
