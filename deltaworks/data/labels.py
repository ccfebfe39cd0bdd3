"""What labels mean: classes, several classes at once, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .bad_rows import Unfit, shown

_LARGEST = 3.4e38

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Labels:
    """What a model's head must know.

    - `problem_type`: as `transformers` names it.
    - `names`: the classes in the order of their ids; for regression one name per number.
    """

    problem_type: Problem
    names: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        return len(self.names)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @property
    def for_config(self) -> dict[str, Any]:
        """What `AutoModelFor...Classification.from_pretrained` takes."""
        return {
            "num_labels": self.num_labels,
            "id2label": self.id2label,
            "label2id": self.label2id,
            "problem_type": self.problem_type,
        }


def _kind(value: Any) -> str:
    if isinstance(value, list):
        kinds = {_kind(item) for item in value} or {"class"}
        return "list of " + ("numbers" if "number" in kinds else "classes")
    return "number" if isinstance(value, float) else "class"


def understand(values: Sequence[Any], declared: Sequence[str] | None, only_text: bool) -> Labels:
    """What the labels of all rows, training and validation, are together.

    A float makes them numbers (regression); a list makes them several classes at once, or several numbers when it holds
    floats; all else are classes, ordered by value so that ids do not depend on the order of rows.

    **Arguments:**

    - `values`: labels as `formats.label` leaves them.
    - `declared`: class names that the source declares; integers are then ids.
    - `only_text`: the source knows only texts (CSV), so that `"0.5"` is a number.
    """
    if only_text and _all_numbers(values):
        return Labels("regression", ("value",))
    # One stray list among classes, or the reverse, is a bad row and must not change what the others mean.
    lists = sum(isinstance(value, list) for value in values)
    kinds = {_kind(value) for value in values if isinstance(value, list) == (2 * lists > len(values))}
    if "list of numbers" in kinds:
        width = max(len(value) for value in values if isinstance(value, list))
        return Labels("regression", tuple(f"value_{index}" for index in range(width)))
    if "list of classes" in kinds:
        names = declared or _names({item for value in values if isinstance(value, list) for item in value})
        return Labels("multi_label_classification", tuple(names))
    if "number" in kinds and not any(isinstance(value, str) for value in values):
        return Labels("regression", ("value",))
    return Labels("single_label_classification", tuple(declared or _names({v for v in values if _kind(v) == "class"})))


def _all_numbers(values: Sequence[Any]) -> bool:
    """Texts that are all numbers, at least one of them not whole."""
    try:
        return bool(values) and any(not float(value).is_integer() for value in values)
    except (TypeError, ValueError, OverflowError):
        return False


def _names(classes: set[Any]) -> list[str]:
    numbers = sorted(item for item in classes if not isinstance(item, str))
    return [*map(str, numbers), *sorted({item for item in classes if isinstance(item, str)} - set(map(str, numbers)))]


def encode(value: Any, labels: Labels, declared: bool) -> Any:
    """A label as the model takes it: an id, a list of ids, a number or a list of numbers.

    **Raises:** `Unfit` when it is not of the kind of the others.
    """
    if labels.problem_type == "regression":
        numbers = value if isinstance(value, list) else [value]
        try:
            numbers = [float(number) for number in numbers]
        except (ValueError, OverflowError):
            raise Unfit(f"label is {shown(value)}; a number is needed, as in the other rows") from None
        if any(abs(number) > _LARGEST for number in numbers):
            raise Unfit(f"label is {shown(value)}; a number that float32 can hold is needed")
        if labels.names == ("value",) and not isinstance(value, list):
            return numbers[0]
        if len(numbers) != labels.num_labels or labels.names == ("value",):
            raise Unfit(f"label is {shown(value)}; {labels.num_labels} number(s) are needed, as in the other rows")
        return numbers
    if labels.problem_type == "multi_label_classification":
        if not isinstance(value, list):
            raise Unfit(f"label is {shown(value)}; a list of classes is needed, as in the other rows")
        return sorted({_id(item, labels, declared) for item in value})
    if isinstance(value, list | float):
        raise Unfit(f"label is {shown(value)}; one class is needed, as in the other rows")
    return _id(value, labels, declared)


def _id(value: Any, labels: Labels, declared: bool) -> int:
    if declared and isinstance(value, int):
        if not 0 <= value < labels.num_labels:
            raise Unfit(f"label is {value}; an id in 0..{labels.num_labels - 1} is needed")
        return value
    index = labels.label2id.get(str(value))
    if index is None:
        raise Unfit(f"label is {shown(value)}; one of {shown(list(labels.names))} is needed")
    return index
