"""The module tree of a model with equal siblings folded into one line, for `deltaworks inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree
from torch import Tensor, nn

from .anatomy import Anatomy, Site
from .kinds import GRAFT, is_linear, linear_shape, own
from .weights import is_quantised


@dataclass
class Node:
    """One line: a module, or several equal ones.

    Attributes:
        name: its name in its parent, or "0-11" for a run of equal siblings, "0, 2, 4" for scattered ones.
        kind: class name.
        roles: what it is for.
        shapes: its own parameters' shapes by name; a linear layer's weight as `out x in`.
        parameters: how many numbers it and everything below hold, of one of the equal modules; a tied weight is counted
            where it comes first.
        times: how many equal modules stand here.
        marks: what is marked in it: parameter names, names of parts, or "call" for the module itself.
    """

    name: str
    kind: str
    roles: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: int = 0
    times: int = 1
    marks: list[str] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def like(self) -> tuple[Any, ...]:
        """What two siblings have in common when they can be folded."""
        shapes = tuple(sorted(self.shapes.items()))
        below = tuple((child.name, child.times, child.like()) for child in self.children)
        return (self.kind, tuple(self.roles), shapes, tuple(self.marks), below)


def folded(anatomy: Anatomy, marked: Sequence[Site] | None = None) -> Node:
    """The tree of `anatomy.model`; `marked` are sites to be marked, as a method or `select` gives them."""
    sites: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        sites.setdefault(site.path, []).append(site)
    marks: dict[str, list[str]] = {}
    for site in marked or ():
        marks.setdefault(site.path, []).append(site.part or site.parameter or "call")
    counted: set[int] = set()

    def grow(name: str, path: str, module: nn.Module) -> Node:
        roles = dict.fromkeys(site.role for site in sites.get(path, ()) if site.role)
        node = Node(name, type(module).__name__, list(roles), marks=sorted(set(marks.get(path, ()))))
        for parameter, value in own(module).items():
            node.shapes[parameter] = _shape(module, parameter, value)
            if id(value) not in counted:
                counted.add(id(value))
                node.parameters += _size(module, parameter, value)
        grown = []
        for child_name, child in module.named_children():
            if child_name != GRAFT:
                grown.append(grow(child_name, f"{path}.{child_name}" if path else child_name, child))
        node.parameters += sum(child.parameters for child in grown)
        node.children = _fold(grown)
        return node

    return grow("", "", anatomy.model)


def _shape(module: nn.Module, parameter: str, value: Tensor) -> tuple[int, ...]:
    return linear_shape(module) if is_linear(module) and parameter == "weight" else tuple(value.shape)


def _size(module: nn.Module, parameter: str, value: Tensor) -> int:
    if is_quantised(value) and is_linear(module) and parameter == "weight":
        fan_out, fan_in = linear_shape(module)  # the storage may be packed
        return fan_out * fan_in
    return value.numel()


def _fold(nodes: list[Node]) -> list[Node]:
    """Numbered siblings that are alike become one, where the first of them stands."""
    kept: dict[Any, list[Node]] = {}
    for node in nodes:
        kept.setdefault(node.like() if node.name.isdigit() else id(node), []).append(node)
    out = []
    for alike in kept.values():
        first = alike[0]
        if len(alike) > 1:
            first.name, first.times = _runs([int(node.name) for node in alike]), len(alike)
            first.parameters = max(node.parameters for node in alike)
        out.append(first)
    return out


def _runs(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def rendered(anatomy: Anatomy, marked: Sequence[Site] | None = None) -> Tree:
    """The folded tree for `rich`: name, class, shapes, role, number of parameters; marks in front and in colour."""

    def grow(node: Node, into: Tree | None) -> Tree:
        branch = Tree(_line(node)) if into is None else into.add(_line(node))
        for child in node.children:
            grow(child, branch)
        return branch

    return grow(folded(anatomy, marked), None)


def _line(node: Node) -> Text:
    line = Text()
    if node.marks:
        line.append("● ", style="bold green")
    if node.name:
        line.append(node.name, style="bold green" if node.marks else "bold")
        line.append(" ")
    line.append(node.kind, style="cyan")
    shapes = [
        (f"{name} " if name != "weight" else "") + "x".join(map(str, shape)) for name, shape in node.shapes.items()
        if name != "bias"
    ]  # fmt: skip
    if "bias" in node.shapes:
        shapes.append("bias")
    if shapes:
        line.append(" " + ", ".join(shapes))
    if node.roles:
        line.append(" " + ", ".join(node.roles), style="magenta")
    if node.parameters:
        times = f"{node.times} x " if node.times > 1 else ""
        line.append(f"  {times}{node.parameters:,}", style="dim")
    if node.marks and node.marks != ["weight"]:
        line.append(f"  [{', '.join(node.marks)}]", style="green")
    return line


def plain(anatomy: Anatomy, marked: Sequence[Site] | None = None) -> str:
    """The folded tree as plain text."""
    console = Console(file=StringIO(), width=200, color_system=None)
    console.print(rendered(anatomy, marked))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def as_dict(anatomy: Anatomy, marked: Sequence[Site] | None = None) -> dict[str, Any]:
    """The folded tree as plain values."""

    def value(node: Node) -> dict[str, Any]:
        made: dict[str, Any] = {"name": node.name, "class": node.kind, "parameters": node.parameters}
        if node.times > 1:
            made["times"] = node.times
        if node.roles:
            made["roles"] = node.roles
        if node.shapes:
            made["shapes"] = {name: list(shape) for name, shape in node.shapes.items()}
        if node.marks:
            made["marked"] = node.marks
        if node.children:
            made["children"] = [value(child) for child in node.children]
        return made

    return value(folded(anatomy, marked))
