"""Functions written anew: with a fault seeded, or the same in other words."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, get_args

from deltaworks.nursery.functions import parsed

Fault = Literal["comparison", "operator", "off by one", "negation", "variable"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.Eq, ast.NotEq: ast.NotEq,
}  # fmt: skip


def faulty(source: str, draw: int | None, kinds: Collection[Fault] = FAULTS) -> tuple[str, str, str] | None:
    """A function as `ast` writes it, the same with a fault, and which; None when there is nothing to get wrong in it.

    Comments, documentation string and the author's layout are gone from both.

    Args:
        source: of the function.
        draw: a large number that decides which of the possible faults it is: the kind first, then the place; None for
            all of them at once, whose kinds are then named together.
        kinds: of faults that are possible.
    """
    tree = parsed(source)
    if tree is None:
        return None
    ways: dict[Fault, list[Callable[[], None]]] = {}
    for kind, change in _faults(tree):
        if kind in kinds:
            ways.setdefault(kind, []).append(change)
    if not ways:
        return None
    before = _written(tree)
    if draw is None:
        fault = " and ".join(sorted(ways))
        for change in (one for some in ways.values() for one in some):
            change()
    else:
        fault = sorted(ways)[draw % len(ways)]
        ways[fault][draw // len(ways) % len(ways[fault])]()
    after = _written(tree)
    return (before, after, fault) if after != before else None


def _faults(tree: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[Fault, Callable[[], None]]]:
    """What can be got wrong in a function: kinds, with what does it to the tree."""

    def setting(node: Any, name: str, value: Any) -> Callable[[], None]:
        return lambda: setattr(node, name, value)

    known = _variables(tree)
    for node in (inner for statement in _statements(tree) for inner in ast.walk(statement)):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
            yield "comparison", setting(node, "ops", [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
        elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
            yield "operator", setting(node, "op", _OPERATORS[type(node.op)]())
        elif isinstance(node, ast.BoolOp):
            yield "operator", setting(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield "off by one", setting(node, "value", node.value + 1)
        elif isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.UnaryOp | ast.Name | ast.Call):
            test = node.test
            negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
            yield "negation", setting(node, "test", test.operand if negated else ast.UnaryOp(ast.Not(), test))  # type: ignore[union-attr]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in known:
            for other in known:
                if other != node.id:
                    yield "variable", setting(node, "id", other)


def renamed(source: str) -> str | None:
    """A function as `ast` writes it, called `function` and otherwise as it is; None for a source that is none."""
    tree = parsed(source)
    if tree is None:
        return None
    tree.name = "function"
    return _written(tree)


def reworded(source: str) -> str | None:
    """The same function in other words: its variables have other names, its comparisons are read from the right.

    None for a source that is no function.
    """
    tree = parsed(source)
    if tree is None:
        return None
    names = {name: f"v{number}" for number, name in enumerate(_variables(tree))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            node.id = names[node.id]
        elif isinstance(node, ast.arg) and node.arg in names:
            node.arg = names[node.arg]
        elif isinstance(node, ast.ExceptHandler) and node.name in names:
            node.name = names[node.name]
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _MIRRORED:
            node.ops = [_MIRRORED[type(node.ops[0])]()]
            node.left, node.comparators = node.comparators[0], [node.left]
    tree.name = "function"
    return _written(tree)


def _variables(tree: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of parameters and of what is assigned to, in order; `self` and `cls` are no choice of the author's."""
    found: dict[str, None] = {}
    outside: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found[node.arg] = None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = None
        elif isinstance(node, ast.Global | ast.Nonlocal):
            outside.update(node.names)
    return [name for name in found if name not in ("self", "cls") and name not in outside]


def _statements(tree: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    documented = ast.get_docstring(tree, clean=False) is not None
    return tree.body[1:] if documented else tree.body


def _written(tree: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The source of a function, without its documentation string."""
    kept = tree.body
    tree.body = _statements(tree)
    try:
        return ast.unparse(ast.fix_missing_locations(tree))
    finally:
        tree.body = kept
