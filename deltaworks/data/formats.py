"""The shapes rows come in, recognised by their columns, each brought to one canonical form.

| format | columns (other names that are recognised) | canonical columns |
|---|---|---|
| `preference` | prompt, chosen, rejected | the same |
| `chat` | messages: `[{role, content}, ...]`; or prompt and completion as such lists | messages |
| `sharegpt` | conversations: `[{from, value}, ...]` | messages |
| `instruction` | instruction, input (may be missing), output (response) | instruction, input, output |
| `prompt-choices` | prompt, choices (options, candidates), answer (label): the right one's place or text | the same |
| `prompt-completion` | prompt (question, query), completion (response, answer) | prompt, completion |
| `source-target` | source, target (input/output, document/summary, article/highlights) | source, target |
| `tokens-tags` | tokens (words), tags (ner_tags, pos_tags, labels) | tokens, tags |
| `image-label` | image (img, image_path), label | image, label |
| `text-label` | text (sentence, ...) or a pair (premise/hypothesis, ...), label | text, text_pair, label |
| `text` | text (content, document) | text |

A chat's messages may carry `weight: 0`, as OpenAI's files do: such a turn is context and is not trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .bad_rows import Unfit, shown
from .images import check_image

Row = dict[str, Any]

LABEL = ("label", "labels", "class", "category", "score", "fine_label")
_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"))
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    - `columns`: canonical column -> the names it goes by, best first. All are needed, except those in `optional`.
    - `parse`: turns a row with canonical names into the canonical row; raises `Unfit` with what would be right.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    parse: Callable[[Row, Path | None], Row]
    optional: tuple[str, ...] = ()

    def match(self, names: Iterable[str]) -> dict[str, str] | None:
        """Canonical column -> the row's own name for it; `None` when a needed one is missing."""
        own = {name.lower(): name for name in names}
        found: dict[str, str] = {}
        for column, aliases in self.columns.items():
            name = next((own[alias] for alias in (column, *aliases) if alias in own), None)
            if name is not None:
                found[column] = name
            elif column not in self.optional:
                return None
        return found


def recognise(names: Sequence[str]) -> tuple[Format, dict[str, str]]:
    """The format of rows with these columns, and which column plays which part.

    **Raises:** `ValueError` that lists the columns there are and the formats there could be.
    """
    for candidate in FORMATS.values():
        found = candidate.match(names)
        if found is not None:
            return candidate, found
    raise ValueError(
        f"columns {', '.join(names) or '(none)'} are no known format; known are "
        + "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in FORMATS.values())
        + "; name yours with columns={'prompt': 'your column', ...} or --column prompt=your_column"
    )


def _text(row: Row, column: str, empty: bool = False) -> str:
    value = row.get(column)
    if value is None:
        raise Unfit(f"{column} is missing; a text is needed")
    if not isinstance(value, str):
        raise Unfit(f"{column} is {shown(value)}, a {type(value).__name__}; a text is needed")
    if not empty and not value.strip():
        raise Unfit(f"{column} is empty; a text is needed")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Unfit(f"{column} holds half a surrogate pair, which is no character; valid Unicode is needed")
    return value


def _list(row: Row, column: str) -> list[Any]:
    """A list; in CSV it stands as JSON."""
    value: Any = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unfit(f"{column} is no JSON list ({error})") from None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise Unfit(f"{column} is {shown(value)}; a list is needed")
    if not value:
        raise Unfit(f"{column} is an empty list")
    return list(value)


def _messages(row: Row, column: str, role_key: str = "role", content_key: str = "content") -> list[Row]:
    messages: list[Row] = []
    for position, message in enumerate(_list(row, column)):
        place = f"{column}[{position}]"
        if not isinstance(message, Mapping):
            raise Unfit(f"{place} is {shown(message)}; an object with {role_key} and {content_key} is needed")
        # Arrow gives every message the fields of all others, as nulls.
        given = {key: value for key, value in message.items() if value is not None}
        # ShareGPT files and OpenAI's mix both spellings.
        role = given.pop(role_key, None) or given.pop("role", None) or given.pop("from", None)
        if not isinstance(role, str) or not role:
            raise Unfit(f"{place} has no {role_key}; system, user, assistant or tool is needed")
        content = given.pop(content_key, given.pop("content", given.pop("value", None)))
        if content is None and "tool_calls" in given:
            content = ""
        if isinstance(content, list):
            parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise Unfit(f"{place} has content that is not text; only text parts can be trained on")
            content = "".join(parts)
        content = _text({f"{place}.{content_key}": content}, f"{place}.{content_key}", empty=True)
        if given.get("weight", 1) not in (0, 1):
            raise Unfit(f"{place}.weight is {shown(given['weight'])}; 0 (not trained on) or 1 is needed")
        role = role.lower()
        message = {"role": _ROLES.get(role, role), "content": content, **given}
        messages.append(message)
    return messages


def _chat(row: Row, folder: Path | None) -> Row:
    if "messages" in row:
        messages: list[Row] = _messages(row, "messages")
    else:
        context: list[Row] = [{**message, "weight": 0} for message in _messages(row, "prompt")]
        messages = context + _messages(row, "completion")
    if not any(m["role"] == "assistant" and m["content"].strip() + str(m.get("tool_calls", "")) for m in messages):
        raise Unfit(f"messages has no assistant turn with content, only {', '.join(m['role'] for m in messages)}")
    if messages[0]["role"] == "assistant":
        raise Unfit("messages begins with an assistant turn; a user's or system's must come before it")
    return {"messages": messages}


def _sharegpt(row: Row, folder: Path | None) -> Row:
    return _chat({"messages": _messages(row, "conversations", "from", "value")}, folder)


def _instruction(row: Row, folder: Path | None) -> Row:
    given = _text({"input": row.get("input") or ""}, "input", empty=True)
    return {"instruction": _text(row, "instruction"), "input": given, "output": _text(row, "output")}


def _prompt_completion(row: Row, folder: Path | None) -> Row:
    return {"prompt": _text(row, "prompt", empty=True), "completion": _text(row, "completion")}


def _prompt_choices(row: Row, folder: Path | None) -> Row:
    texts = _list(row, "choices")
    choices = [_text({f"choices[{i}]": text}, f"choices[{i}]") for i, text in enumerate(texts)]
    if len(set(choices)) < len(choices):
        twice = max(choices, key=choices.count)
        raise Unfit(f"choices has {shown(twice)} more than once; different texts are needed")
    answer: Any = row.get("answer")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    elif isinstance(answer, str) and answer.strip().isdecimal():  # CSV knows no numbers
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise Unfit(f"answer is {shown(answer)}; a place in 0..{len(choices) - 1} or the text of a choice is needed")
    return {"prompt": _text(row, "prompt", empty=True), "choices": choices, "answer": answer}


def _source_target(row: Row, folder: Path | None) -> Row:
    return {"source": _text(row, "source"), "target": _text(row, "target")}


def _preference(row: Row, folder: Path | None) -> Row:
    parsed: Row = {}
    for column in ("prompt", "chosen", "rejected"):
        if column == "prompt" and row.get("prompt") is None:
            if isinstance(row.get("chosen"), str):
                raise Unfit("prompt is missing; only chats may hold it in chosen and rejected")
            continue
        value = row.get(column)
        chat = isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip().startswith('[{"'))
        parsed[column] = _messages(row, column) if chat else _text(row, column)
    if len({type(value) for value in parsed.values()}) > 1:
        raise Unfit("prompt, chosen and rejected are partly texts and partly chats; they must be of one kind")
    if parsed["chosen"] == parsed["rejected"]:
        raise Unfit("chosen and rejected are the same; nothing is preferred")
    return parsed


def _tokens_tags(row: Row, folder: Path | None) -> Row:
    tokens, tags = _list(row, "tokens"), _list(row, "tags")
    for position, token in enumerate(tokens):
        _text({f"tokens[{position}]": token}, f"tokens[{position}]", empty=True)
    if len(tokens) != len(tags):
        raise Unfit(f"{len(tokens)} tokens but {len(tags)} tags; one tag per token is needed")
    return {"tokens": tokens, "tags": [_class(tag, f"tags[{i}]") for i, tag in enumerate(tags)]}


def _text_label(row: Row, folder: Path | None) -> Row:
    parsed = {"text": _text(row, "text")}
    if "text_pair" in row:
        parsed["text_pair"] = _text(row, "text_pair")
    return parsed | {"label": label(row.get("label"))}


def _image_label(row: Row, folder: Path | None) -> Row:
    return {"image": check_image(row.get("image"), folder), "label": label(row.get("label"))}


def _plain_text(row: Row, folder: Path | None) -> Row:
    return {"text": _text(row, "text")}


def label(value: Any) -> Any:
    """A label as it stands in a row: a class (text, integer, boolean), a number, or a list of these.

    **Raises:** `Unfit` when it is missing, empty, not finite or something else.
    """
    if isinstance(value, np.ndarray | np.generic | Tensor):
        value = value.tolist()
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _list({"label": value}, "label")
    if isinstance(value, list | tuple):
        return [_class(item, f"label[{position}]") for position, item in enumerate(value)]
    return _class(value, "label")


def _class(value: Any, place: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unfit(f"{place} is missing; a class or a number is needed")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise Unfit(f"{place} is {value}; a class or a finite number is needed")
    if not isinstance(value, str | int | float):
        raise Unfit(f"{place} is {shown(value)}, a {type(value).__name__}; a class or a number is needed")
    return value.strip() if isinstance(value, str) else value


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("preference", {"prompt": (), "chosen": (), "rejected": ()}, _preference, optional=("prompt",)),
        Format("tokens-tags", {"tokens": ("words",), "tags": ("ner_tags", "pos_tags", "labels")}, _tokens_tags),
        Format("chat", {"messages": ()}, _chat),
        Format("sharegpt", {"conversations": ("conversation",)}, _sharegpt),
        Format(
            "instruction",
            {"instruction": (), "input": ("context",), "output": ("response",)},
            _instruction,
            optional=("input",),
        ),
        Format(
            "prompt-choices",
            {"prompt": ("question", "query"), "choices": ("options", "candidates"), "answer": ("label",)},
            _prompt_choices,
        ),
        Format(
            "prompt-completion",
            {"prompt": ("question", "query"), "completion": ("response", "answer")},
            _prompt_completion,
        ),
        Format("image-label", {"image": ("img", "image_path"), "label": LABEL}, _image_label),
        Format(
            "text-label",
            {
                "text": ("sentence", *(first for first, _ in _PAIRS)),
                "text_pair": tuple(second for _, second in _PAIRS),
                "label": LABEL,
            },
            _text_label,
            optional=("text_pair",),
        ),
        Format(
            "source-target",
            {"source": ("input", "document", "article"), "target": ("output", "summary", "highlights")},
            _source_target,
        ),
        Format("text", {"text": ("content", "document")}, _plain_text),
    )
}
