"""Which modules a PEFT configuration means, and the shortest way to name a set of modules in one.

PEFT's rules: a list holds names that a module's dotted name equals or ends with, a text is a regular expression for the
whole name, "all-linear" is every linear layer but the one that makes the logits.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import regex
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...model.names import PATIENCE, matches
from ...model.weights import CONVOLUTIONS

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Targets:
    """The part of a configuration that chooses modules; the names are PEFT's."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] = field(default_factory=list)

    def chosen(self, model: nn.Module) -> list[str]:
        """Names of the modules of `model` that are meant, in model order."""
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            return [path for path in _linear(model) if not self._excluded(path)]
        return [path for path, _ in modules(model) if path and self._matches(path)]

    def _matches(self, path: str) -> bool:
        if self._excluded(path) or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return matches(self.target_modules, path)
        return ends_with(path, self._wanted) and self._in_layers(path)

    def _excluded(self, path: str) -> bool:
        plain, patterns = self._saved
        if not plain.isdisjoint(path.split(".")) or any(matches(pattern, path) for pattern in patterns):
            return True
        if isinstance(self.exclude_modules, str):
            return matches(self.exclude_modules, path)
        return ends_with(path, self._unwanted)

    @functools.cached_property
    def _wanted(self) -> frozenset[str]:
        return frozenset(self.target_modules or ())

    @functools.cached_property
    def _unwanted(self) -> frozenset[str]:
        return frozenset(self.exclude_modules or ())

    @functools.cached_property
    def _saved(self) -> tuple[frozenset[str], list[str]]:
        """Modules to save that are plain names, and what PEFT makes of the others, which are expressions."""
        plain = frozenset(name for name in self.modules_to_save if regex.fullmatch(r"\w+", name))
        others = [name for name in dict.fromkeys(self.modules_to_save) if name not in plain]
        return plain, [rf"(^|.*\.){name}($|\..*)" for name in others]

    def _in_layers(self, path: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = None
        for pattern in patterns or [r"[^.]*"]:
            lead = rf"(?:^|.*?\.){pattern}" if patterns else r".*?\.[^.]*"
            found = found or regex.match(rf"{lead}\.(?P<index>\d+)\.", path, timeout=PATIENCE)
        return found is not None and int(found["index"]) in ([wanted] if isinstance(wanted, int) else wanted)


def ends_with(path: str, names: Set[str]) -> bool:
    """Whether a dotted name is one of `names` or ends with one, however many there are."""
    while path:
        if path in names:
            return True
        path = path.partition(".")[2]
    return False


def ends_in(path: str, names: Set[str]) -> bool:
    """Whether a text ends with one of `names`, which need not begin where a name begins."""
    return any(path[start:] in names for start in range(len(path)))


def modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The base's modules with their names; a module that stands at two places has both."""
    for path, module in model.named_modules(remove_duplicate=False):
        if "deltaworks" not in path.split("."):
            yield path, module


def adapts(layer: nn.Module, kinds: tuple[type[nn.Module], ...], *, any_convolution: bool = False) -> bool:
    """Whether a PEFT type for layers of these kinds computes what we do at this one.

    PEFT pads with zeros whatever the layer does, and types that rotate read the first of a convolution's sizes only.
    """
    if not isinstance(layer, kinds):
        return False
    if not isinstance(layer, CONVOLUTIONS):
        return True
    sizes = layer.kernel_size, layer.stride, layer.padding
    square = all(isinstance(size, tuple) and len(set(size)) == 1 for size in sizes) and layer.groups == 1
    return layer.padding_mode == "zeros" and (any_convolution or (square and set(layer.dilation) == {1}))


def _linear(model: nn.Module) -> list[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if output is None and "SequenceClassification" in type(model).__name__:
        output = next((head for name in _HEADS if (head := getattr(model, name, None)) is not None), None)
    return [path for path, module in modules(model) if isinstance(module, (nn.Linear, Conv1D)) and module is not output]


def named(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """What `target_modules` holds for these modules: last names where they mean exactly these, whole ones if not."""
    last = {path.rpartition(".")[2] for path in paths}
    meant = {path for path, _ in modules(model) if path and ends_with(path, last)}
    return sorted(last) if meant == set(paths) else list(paths)


def pattern_for(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a name, as PEFT and `Method.at` decide."""
    return next((value for pattern, value in patterns.items() if matches(rf"(.*\.)?({pattern})$", path)), default)


def patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One value per module as a default and the patterns of those that differ.

    A pattern is a last name where all modules of that name agree, and a whole name elsewhere, which every PEFT type
    finds whether it takes patterns as regular expressions or looks names up.
    """
    default = Counter(values.values()).most_common(1)[0][0]
    by_last: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_last.setdefault(path.rpartition(".")[2], set()).add(value)
    found: dict[str, Any] = {}
    for path, value in values.items():
        last = path.rpartition(".")[2]
        if value != default:
            found[path if len(by_last[last]) > 1 else last] = value
    return default, found
