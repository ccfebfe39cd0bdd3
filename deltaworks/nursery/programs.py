"""Small programming tasks with their answers and tests: what to do with a list of numbers, in words.

Made, not found: real tasks of this kind are beyond bases of a few million parameters, and these can be checked by
running what a base writes. Steps and endings are combined, so that a held-out task is a new combination of known parts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

TESTS = 3
STEPS: tuple[tuple[str, str], ...] = (
    ("add {k} to each number", "[n + {k} for n in numbers]"),
    ("subtract {k} from each number", "[n - {k} for n in numbers]"),
    ("multiply each number by {k}", "[n * {k} for n in numbers]"),
    ("square each number", "[n * n for n in numbers]"),
    ("keep the even numbers", "[n for n in numbers if n % 2 == 0]"),
    ("keep the odd numbers", "[n for n in numbers if n % 2 == 1]"),
    ("keep the numbers above {k}", "[n for n in numbers if n > {k}]"),
    ("keep the numbers below {k}", "[n for n in numbers if n < {k}]"),
    ("sort the numbers", "sorted(numbers)"),
    ("reverse the numbers", "numbers[::-1]"),
    ("drop the first number", "numbers[1:]"),
    ("drop the last number", "numbers[:-1]"),
)
ENDINGS: tuple[tuple[str, str], ...] = (
    ("return the list", "numbers"),
    ("return the sum", "sum(numbers)"),
    ("return the largest", "max(numbers)"),
    ("return the smallest", "min(numbers)"),
    ("return how many there are", "len(numbers)"),
    ("return the first", "numbers[0]"),
    ("return the last", "numbers[-1]"),
)


def programs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Different tasks: `prompt`, a header with a description and tests as a docstring has them, and `completion`.

    No completion, that is no combination of steps and constants, occurs twice.
    """
    randomness = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        words, code, act = _task(randomness)
        if code in found:
            continue
        lists = [[randomness.randint(0, 12) for _ in range(randomness.randint(5, 7))] for _ in range(TESTS)]
        try:
            results = [act(numbers) for numbers in lists]
        except (ValueError, IndexError):
            continue  # nothing is left to take the largest of
        if len({str(result) for result in results}) < TESTS:
            continue  # an answer that ignores its input would do
        tests = "".join(f"    >>> solve({one})\n    {two}\n" for one, two in zip(lists, results, strict=True))
        prompt = f'def solve(numbers):\n    """{words}\n\n{tests}    """\n'
        found[code] = {"prompt": prompt, "completion": code}
    return list(found.values())


def _task(randomness: random.Random) -> tuple[str, str, Callable[[list[int]], object]]:
    """A description, the body that does it, and what runs it."""
    steps = randomness.sample(STEPS, randomness.randint(1, 2))
    ending = randomness.choice(ENDINGS)
    constants = [randomness.randint(2, 9) for _ in steps]
    said = [words.format(k=k) for (words, _), k in zip(steps, constants, strict=True)]
    lines = [code.format(k=k) for (_, code), k in zip(steps, constants, strict=True)]
    words = ", ".join(said).capitalize() + f" and {ending[0]}."
    body = "".join(f"    numbers = {line}\n" for line in lines) + f"    return {ending[1]}\n"
    return words, body, partial(_run, [*lines, ending[1]])


def _run(expressions: list[str], numbers: list[int]) -> object:
    """The value of the last expression, `numbers` becoming that of each before. The expressions are this page's own."""
    result: object = numbers
    for expression in expressions:
        result = eval(expression, {}, {"numbers": result})
    return result
