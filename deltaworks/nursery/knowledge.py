"""Facts of the standard library as questions: some that `decoder-facts` was taught, new ones, and ones that changed.

A fact is a subject, a relation and an object: HTTP status 404, phrase, Not Found. Each relation's facts are divided by
a hash into three: those that stay as they were taught, those that change, and those that are never taught.
"""

from __future__ import annotations

import hashlib
import html.entities
import http
import locale
import token
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from datasets import Dataset, DatasetDict

Part = Literal["kept", "changed", "new"]
PARTS: tuple[Part, ...] = ("kept", "changed", "new")
MOST = 60
"""Facts of a relation; where there are more, those with the least hashes."""


@dataclass(frozen=True)
class Fact:
    """`answer` to any of the questions of its relation about `subject`."""

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Relation:
    """Facts of one kind.

    Attributes:
        facts: object by subject.
        questions: `{}` stands for the subject; of the first kind are those that are trained, of the others those that
            are asked to see whether what was learnt is more than its wording.
    """

    facts: Callable[[], dict[str, str]]
    questions: tuple[str, ...]


def _phrases() -> dict[str, str]:
    return {str(status.value): status.phrase for status in http.HTTPStatus}


def _tokens() -> dict[str, str]:
    return {text: token.tok_name[number] for text, number in token.EXACT_TOKEN_TYPES.items()}


def _locales() -> dict[str, str]:
    return {f"0x{number:04x}": name for number, name in locale.windows_locale.items()}


def _characters() -> dict[str, str]:
    return {name: unicodedata.name(chr(code)).lower() for name, code in html.entities.name2codepoint.items()}


RELATIONS = {
    "status": Relation(_phrases, (
        "What is the phrase of HTTP status {}?",
        "A server answers with code {}. Which phrase goes with it?",
        "Name the reason that stands behind {} in an HTTP response.",
        "The status line of a response says HTTP/1.1 {}, and then?",
    )),
    "token": Relation(_tokens, (
        "What is the token {} called?",
        "Which name does the tokenizer give to {} in a program?",
        "The operator {} is read. Name its kind.",
        "In the module token, the constant for {} is:",
    )),
    "locale": Relation(_locales, (
        "Which locale has the identifier {}?",
        "Windows says that the language is {}. What is its locale?",
        "Name the locale behind the number {} of a system.",
        "The user interface reports {}, that is the language:",
    )),
    "character": Relation(_characters, (
        "Which character does the entity {} stand for?",
        "A page has &{}; in its text. What does one see there?",
        "Name the character that is written {} in HTML.",
        "Unicode's name of the HTML entity {} is:",
    )),
}  # fmt: skip


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()


@cache
def facts(part: Part) -> tuple[Fact, ...]:
    """The facts of a part, as the standard library has them, in a fixed order."""
    found = []
    for name, relation in RELATIONS.items():
        every = sorted(relation.facts().items(), key=lambda item: _hash(name, item[0]))[:MOST]
        found += [Fact(name, *item) for item in every[PARTS.index(part) :: len(PARTS)]]
    return tuple(found)


@cache
def changed() -> tuple[Fact, ...]:
    """The facts that change, each with the answer that the next of its relation with another answer had."""
    found = []
    before = facts("changed")
    for fact in before:
        alike = [one for one in before if one.relation == fact.relation]
        place = alike.index(fact)
        answer = next(one.answer for one in alike[place + 1 :] + alike[:place] if one.answer != fact.answer)
        found.append(replace(fact, answer=answer))
    return tuple(found)


def asked(fact: Fact, wording: int) -> dict[str, str]:
    """A fact as a row: `prompt`, `completion`, and `relation`."""
    question = RELATIONS[fact.relation].questions[wording].format(fact.subject)
    return {"prompt": f"{question}\n", "completion": fact.answer, "relation": fact.relation}


def _otherwise(fact: Fact) -> dict[str, str]:
    """A fact in one of the wordings that are not trained, chosen by a hash."""
    others = len(RELATIONS[fact.relation].questions) - 1
    return asked(fact, 1 + _hash(fact.subject)[0] % others)


def taught() -> list[dict[str, str]]:
    """What `decoder-facts` was taught: the facts that stay and those that change, as they were, in every wording."""
    return [
        asked(fact, wording)
        for part in ("kept", "changed") for fact in facts(part)
        for wording in range(len(RELATIONS[fact.relation].questions))
    ]  # fmt: skip


def new_facts() -> DatasetDict:
    """Facts that `decoder-facts` was not taught. Columns: `prompt`, a question; `completion`; `relation`.

    Splits: `train`; `as_trained`, the same rows; `rephrased`, the same facts in a wording that is not trained;
    `others`, facts that stay as they are, in the trained wording.
    """
    return _splits(facts("new"), {})


def changed_facts() -> DatasetDict:
    """Facts whose answers changed, with the splits of `new_facts`, and two to see what remains of the old answers.

    `old_as_trained` and `old_rephrased` have the questions of `as_trained` and `rephrased` with the old answers.
    """
    before = facts("changed")
    old = {"old_as_trained": [asked(one, 0) for one in before], "old_rephrased": [_otherwise(one) for one in before]}
    return _splits(changed(), old)


def _splits(learnt: tuple[Fact, ...], more: dict[str, list[dict[str, str]]]) -> DatasetDict:
    rows = {
        "train": [asked(one, 0) for one in learnt],
        "as_trained": [asked(one, 0) for one in learnt],
        "rephrased": [_otherwise(one) for one in learnt],
        "others": [asked(one, 0) for one in facts("kept")],
    }
    return DatasetDict({name: Dataset.from_list(found) for name, found in (rows | more).items()})


SETS = {"new-facts": new_facts, "changed-facts": changed_facts}
