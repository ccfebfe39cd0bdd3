"""Data sets with several labels a text or with choices, built in seconds from what is on the machine."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from deltaworks.nursery import sets

YEARS = range(2018, 2025)
MONTHS = tuple(date(2000, month, 1).strftime("%B") for month in range(1, 13))
RULES = ("fixed", "easter", "orthodox easter", "weekday", "other")
CHOICES = 4
SURPRISE = ("es", "el", "ka")
"""Languages that no training row is in: Spanish, Greek and Georgian, as in SemEval 2023's task 3."""


@dataclass
class Holiday:
    """A name in one language, with every day of `YEARS` on which a country that calls a day so keeps it."""

    text: str
    language: str
    days: set[date] = field(default_factory=set)
    translations: Counter[str] = field(default_factory=Counter)

    @property
    def english(self) -> str:
        """Its most frequent English name, the first in the alphabet of several."""
        return min(self.translations, key=lambda name: (-self.translations[name], name))

    @property
    def held_out(self) -> bool:
        """A fifth of the English names, with all that translates to them."""
        return hashlib.sha256(self.english.encode()).digest()[0] % 5 == 0


def holidays() -> DatasetDict:
    """The name of a public holiday, in the language of the country that keeps it -> the months it falls in.

    Columns: `text`; `label`, several of `MONTHS` at once; `rule`, the one of `RULES` that all its days keep;
    `language`, two or three letters. Choose `rule` with `columns: {label: rule}`.

    Splits, so that a study can train on originals, on translations or on English alone and be tested alike:

    | learn from | test on |
    |---|---|
    | `train`: names in some 65 languages | `validation`: other holidays in these languages |
    | `translated`: the same rows in English | `translated_validation`: the same rows in English |
    | `english`: those rows of `train` that are in English | `surprise`: languages that no row of `train` is in |

    No holiday of a validation split has a name in a training split, not even in English. The surprise languages have
    holidays that are known in other languages; in `translated_surprise` they may so have names that are trained on,
    which is what translating them is for.

    Names and translations are those of the package `holidays`; a name that several countries use is one row. Holidays
    of which the package only estimates the days, and days with several holidays, are left out.

    Raises:
        ImportError: when `holidays` is missing.
    """
    splits: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("train", "validation", "surprise", "translated", "translated_validation",
                              "translated_surprise", "english")
    }  # fmt: skip
    for one in _named():
        label, rule = sorted({day.month - 1 for day in one.days}), RULES.index(_rule(one.days))
        rest = {"label": label, "rule": rule, "language": one.language}
        where = "surprise" if one.language in SURPRISE else "validation" if one.held_out else "train"
        splits[where].append({"text": one.text, **rest})
        splits["translated" if where == "train" else f"translated_{where}"].append({"text": one.english, **rest})
        if where == "train" and one.language == "en":
            splits["english"].append({"text": one.text, **rest})
    features = Features({
        "text": Value("string"), "label": List(ClassLabel(names=list(MONTHS))),
        "rule": ClassLabel(names=list(RULES)), "language": Value("string"),
    })  # fmt: skip
    return DatasetDict({name: Dataset.from_list(rows, features=features) for name, rows in splits.items()})


def _named() -> list[Holiday]:
    """Every name in its language, in an order that depends on nothing but the names."""
    try:
        import holidays as calendars
    except ImportError as error:
        raise ImportError(f"nursery:holidays needs {error.name}: pip install 'deltaworks[studies]'") from error
    translated = calendars.list_localized_countries(include_aliases=False)
    found: dict[tuple[str, str], Holiday] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of countries whose calendar begins later than YEARS
        for code in sorted(calendars.list_supported_countries(include_aliases=False)):
            own = getattr(calendars, code).default_language
            language = (own or "en_US").split("_")[0]
            if language != "en" and "en_US" not in translated.get(code, ()):
                continue
            original = calendars.country_holidays(code, years=YEARS, observed=False, language=own)
            english = original
            if language != "en":
                english = calendars.country_holidays(code, years=YEARS, observed=False, language="en_US")
            for day, name in original.items():
                # "; " joins several holidays of one day, brackets hold "estimated", "observed" and the like.
                if day not in english or any(mark in text for mark in ("; ", "(") for text in (name, english[day])):
                    continue
                one = found.setdefault((language, name), Holiday(name, language))
                one.days.add(day)
                one.translations[english[day]] += 1
    return sorted(found.values(), key=lambda one: hashlib.sha256(f"{one.language} {one.text}".encode()).digest())


def _rule(days: set[date]) -> str:
    """What the days of a holiday have in common: the date, the distance from an Easter, or the day of the week."""
    from dateutil.easter import EASTER_ORTHODOX, EASTER_WESTERN, easter

    if len({(day.month, day.day) for day in days}) == 1:
        return "fixed"
    if len({(day - easter(day.year, EASTER_WESTERN)).days for day in days}) == 1:
        return "easter"
    if len({(day - easter(day.year, EASTER_ORTHODOX)).days for day in days}) == 1:
        return "orthodox easter"
    return "weekday" if len({day.weekday() for day in days}) == 1 else "other"


def choices() -> DatasetDict:
    """A function's signature, and the documentation strings of four functions of its module: which is its own?

    Columns: `prompt` as in `sets.docstrings`, `choices`, `answer`, the place of the right one, and `module`. Where a
    module has too few functions, the others are from the same split.
    """
    splits = {}
    for split, held in sets.docstrings().items():
        rows = held.to_list()
        mates: dict[str, list[str]] = {}
        for row in rows:
            mates.setdefault(row["module"], []).append(row["completion"])
        everything = [row["completion"] for row in rows]
        made = []
        for row in rows:
            draw = random.Random(row["prompt"] + row["completion"])
            near = [text for text in mates[row["module"]] if text != row["completion"]]
            others = draw.sample(near, min(CHOICES - 1, len(near)))
            while len(others) < CHOICES - 1:
                other = draw.choice(everything)
                if other not in (row["completion"], *others):
                    others.append(other)
            answer = draw.randrange(CHOICES)
            others.insert(answer, row["completion"])
            made.append({"prompt": row["prompt"], "choices": others, "answer": answer, "module": row["module"]})
        splits[split] = Dataset.from_list(made)
    return DatasetDict(splits)


SETS = {"holidays": holidays, "choices": choices}
