"""How near a generated text is to the wanted one."""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from .sandbox import passes

EXECUTED = "passes"
"""The figure that what is generated must be run for."""
GENERATED = ("exact_match", "similarity", "chrf", "parses", EXECUTED)
"""Figures of what is generated."""


def exact_match(reference: str, generated: str) -> float:
    """1 when the texts are the same but for white space around them."""
    return float(reference.strip() == generated.strip())


def similarity(reference: str, generated: str) -> float:
    """Share of characters in common runs, 0 to 1 (Ratcliff and Obershelp, as `difflib` computes it)."""
    return SequenceMatcher(None, reference.strip(), generated.strip(), autojunk=False).ratio()


def chrf(reference: str, generated: str, order: int = 6, beta: float = 2.0) -> float:
    """chrF, 0 to 1: F-score of character n-grams up to `order`, white space left out (Popović 2015, W15-3049)."""
    one, other = "".join(reference.split()), "".join(generated.split())
    precisions, recalls = [], []
    for n in range(1, order + 1):
        wanted, found = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (one, other))
        if not wanted or not found:
            continue
        hits = (wanted & found).total()
        precisions.append(hits / found.total())
        recalls.append(hits / wanted.total())
    if not precisions:
        return float(one == other)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    below = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / below if below else 0.0


def parses(prompt: str, generated: str) -> float:
    """1 when the prompt and what follows it, or what follows alone, are Python that parses."""
    for text in (prompt + generated, generated):
        try:
            ast.parse(textwrap.dedent(text))
            return 1.0
        except (SyntaxError, ValueError):
            continue
    return 0.0


def scores(samples: Sequence[Mapping[str, str]], *, execute: bool = False) -> dict[str, float]:
    """Means over samples (`prompt`, `reference`, `generated`): `exact_match`, `similarity`, `chrf`, `parses`.

    With `execute`, what was generated is run where its prompt holds tests (`sandbox`): `passes`, of those samples.
    """
    if not samples:
        return {}
    found: Counter[str] = Counter()
    for sample in samples:
        pair = sample["reference"], sample["generated"]
        found["exact_match"] += exact_match(*pair)  # type: ignore[assignment]
        found["similarity"] += similarity(*pair)  # type: ignore[assignment]
        found["chrf"] += chrf(*pair)  # type: ignore[assignment]
        found["parses"] += parses(sample["prompt"], sample["generated"])  # type: ignore[assignment]
    means = {name: total / len(samples) for name, total in found.items()}
    tested = [passes(one["prompt"], one["generated"]) for one in samples] if execute else []
    passed = [one for one in tested if one is not None]
    return means | ({EXECUTED: sum(passed) / len(passed)} if passed else {})
