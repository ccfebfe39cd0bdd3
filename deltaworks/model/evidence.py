"""What the parts of a survey share: the model's modules, the trace, and what has been found so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .kinds import base_modules, experts_shapes, is_conv, is_linear, is_norm
from .trace import Trace, trace


@dataclass
class Attention:
    """One attention in a block: the module that holds the query projection, and its layers by role."""

    path: str
    layers: dict[str, list[str]] = field(default_factory=dict)
    cross: bool = False

    def first(self, *roles: str) -> str | None:
        return next((paths[0] for role in roles if (paths := self.layers.get(role))), None)


@dataclass
class Unit:
    """What was found in one block before it is written down as a `Block`.

    Attributes:
        mlp: the feed-forward part's layers by role (of the dense one beside experts, where there are both).
        pre, post: the norms before and after the sub-layers "attention", "cross_attention", "ssm", "mlp".
        out: the modules whose output the sub-layers add to the residual.
        leading_norm: whether a norm comes before the first sub-layer.
    """

    path: str
    cores: list[Attention] = field(default_factory=list)
    mlp: dict[str, list[str]] = field(default_factory=dict)
    ssm: str | None = None
    experts: str | None = None
    router: str | None = None
    hidden: int | None = None
    pre: dict[str, str] = field(default_factory=dict)
    post: dict[str, str] = field(default_factory=dict)
    out: dict[str, str | None] = field(default_factory=dict)
    mlp_in: str | None = None
    mlp_module: str | None = None
    parallel: bool = False
    leading_norm: bool = False

    def core(self, cross: bool) -> Attention | None:
        return next((core for core in self.cores if core.cross == cross), None)


class Evidence:
    """Everything known of a model while it is surveyed.

    Attributes:
        role, norm_role: what has been found, by module path (`path:parameter` for experts' parameters).
        rows: parts of fused weights, by path likewise.
        uncalled: layers whose weights are used without calling them.
        asked: answers of modules that were run, by their class and sizes.
        places: the paths of all blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(base_modules(model))
        self.path_of = {id(module): path for path, module in self.modules.items()}
        self.config = getattr(model, "config", None)
        self.trace: Trace = trace(model)
        self.role: dict[str, str] = {}
        self.norm_role: dict[str, str] = {}
        self.rows: dict[str, dict[str, tuple[int, ...]]] = {}
        self.uncalled: set[str] = set()
        self.asked: dict[Any, Any] = {}
        self.places: set[str] = set()

    def children(self, path: str) -> list[str]:
        return [f"{path}.{name}" if path else name for name, _ in self.modules[path].named_children()]

    def get(self, path: str) -> nn.Module:
        return self.modules[path]

    def below(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules inside `path`, with their full paths."""
        prefix = f"{path}." if path else ""
        for name, module in self.modules.items():
            if name.startswith(prefix) and name != path:
                yield name, module

    def weights_in(self, path: str) -> int:
        return sum(
            is_linear(module) or is_conv(module) or bool(experts_shapes(module)) for _, module in self.below(path)
        )

    def has_norm(self, path: str) -> bool:
        return any(is_norm(module) for _, module in self.below(path))

    def in_block(self, path: str) -> bool:
        return self.block_of(path) is not None

    def block_of(self, path: str) -> str | None:
        """The path of the block that holds `path`, None outside the blocks."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return path or None


def holds(outer: str, path: str) -> bool:
    """Whether `path` is `outer` or lies inside it."""
    return path == outer or path.startswith(outer + ".")


def integer(sources: Iterable[Any], attributes: Iterable[str]) -> int | None:
    """The first whole number that one of `sources` has under one of these names."""
    for source in sources:
        for attribute in attributes:
            value = getattr(source, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
