"""A trial, the smallest piece of a study: one recipe run once, known by what its result depends on.

Its key is a hash of the recipe, of the content of base and data, and of the source code that a run of this recipe can
reach. So a trial that was run, by whatever study, is not run again, and one whose data or code changed is.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import platform
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.method import Method
from ..nursery import PREFIX, base_path
from ..training.recipe import Recipe
from ..training.tune import FREE

Kind = Literal["tune", "base", "context"]
Half = Literal["choosing", "reporting"]
BASE, CONTEXT = "base", "in-context"
"""The names of the baselines that train nothing, where a method's slug stands otherwise."""

WHOLE_FILE = 64 << 20  # files up to this many bytes are read whole for their mark, larger ones in pieces
PIECES, PIECE = 256, 64 << 10
PACKAGES = ("torch", "transformers", "accelerate", "trl", "tokenizers", "datasets", "numpy")
REPORTED = ("samples", "sample_length", "evaluate_every")
"""Keys of a recipe that change nothing that is learned, but what is known of it."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a study.

    Attributes:
        recipe: what is run; its seed decides initial values, data order and held-out share. `output` is not used.
        kind: "tune" trains, "base" looks at the base untouched, "context" at the base with examples in its prompt.
        half: which half of the held-out rows its figures are of, the one settings are chosen by or the one results are
            reported on; None for all rows.
        domain: text of the base's own domain, of which the loss is measured before and after: a source as `data=`
            takes it, or `nursery:NAME` of a text base.
        context: training examples in the prompt, where kind is "context".
        execute: whether what is generated is run where its prompt holds tests, for the figure `passes`.
        groups: column of the data that says to which group a held-out row belongs; figures are then also by group.
        labels: what the study calls it; no part of the key.
    """

    recipe: Recipe
    kind: Kind = "tune"
    half: Half | None = None
    domain: str | None = None
    context: int = 0
    execute: bool = False
    groups: str | None = None
    labels: dict[str, Any] = field(default_factory=dict, compare=False)

    def content(self) -> dict[str, Any]:
        """What the result depends on, as plain values.

        Raises:
            ValueError, OSError: when base or data are not there.
        """
        recipe = self.recipe.complete().as_dict()
        kept = {name: value for name, value in recipe.items() if name not in FREE or name in REPORTED}
        if self.kind != "tune":
            # What trains nothing is the same for every method and rate.
            unused = ("method", "settings", "also", "lr", "schedule", "warmup", "optimizer", "weight_decay", "clip")
            unused += ("steps", "epochs", "accumulation", "checkpointing", "measure", "evaluate_every")
            kept = {name: value for name, value in kept.items() if name not in unused}
        asked = ({"groups": self.groups} if self.groups else {}) | ({"execute": True} if self.execute else {})
        return asked | {
            "kind": self.kind,
            "half": self.half,
            "context": self.context,
            "recipe": kept,
            "device": recipe["device"] or ("cuda" if torch.cuda.is_available() else "cpu"),
            "base": mark(self.recipe.base, base=True),
            "data": mark(self.recipe.data),
            "validation": _file_mark(self.recipe.validation),
            "domain": (self.domain, mark(self.domain)) if self.domain else None,
            "code": code(*sorted(_pages(self.recipe.made())) if self.kind == "tune" else ()),
            "versions": _versions(),
        }

    def key(self) -> str:
        """Twenty hexadecimal digits, the same for the same work."""
        text = json.dumps(self.content(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def _pages(method: Method) -> set[str]:
    """The pages of a method and of those that it is made of."""
    return {type(method).__module__}.union(*map(_pages, method.made_of()))


def _file_mark(value: Any) -> str | None:
    return mark(value) if isinstance(value, str) and Path(value).expanduser().exists() else None


# Content


def mark(name: str, *, base: bool = False) -> str:
    """A short mark of what a name stands for: a file's or folder's content, or the name of what is elsewhere.

    The nursery's data come from the running Python, whose version is their content; what comes from the Hub is known
    by name and, where a copy is here, by the revision of it.
    """
    if name.startswith(PREFIX):
        bare = name.removeprefix(PREFIX)
        if base:
            return mark(str(base_path(bare)))
        return f"{name} of Python {platform.python_version()}, scikit-learn {_version('scikit-learn')}"
    path = Path(name).expanduser()
    if path.is_file():
        return _of_file(path, path.stat().st_size, path.stat().st_mtime_ns)
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file() and not item.name.startswith("."))
        total = hashlib.sha256()
        for item in files:
            stat = item.stat()
            total.update(f"{item.relative_to(path)}\0{_of_file(item, stat.st_size, stat.st_mtime_ns)}\n".encode())
        return total.hexdigest()[:20]
    return f"{name} {_revision(name, 'models' if base else 'datasets')}".strip()


@cache
def _of_file(path: Path, size: int, changed: int) -> str:
    """A hash of a file: of all of it, or of its size and evenly spread pieces where it is very large."""
    total = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE:
            total.update(file.read())
        else:
            for number in range(PIECES):
                file.seek((size - PIECE) * number // (PIECES - 1))
                total.update(file.read(PIECE))
    return total.hexdigest()[:20]


def _revision(name: str, kind: str) -> str:
    """The commit of a Hub repository's copy in the local cache, empty where there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE) / f"{kind}--{name.partition(':')[0].replace('/', '--')}" / "refs" / "main"
    return path.read_text().strip() if path.is_file() else ""


# Code


@cache
def code(*pages: str) -> str:
    """A hash of the sources that a run reaches: those that `training` imports, the nursery's, and methods' pages.

    Other methods, commands and reports may change without making a result old.
    """
    package = __name__.partition(".")[0]
    found = _reached({f"{package}.training.tune", f"{package}.study.work", *pages}, package)
    total = hashlib.sha256()
    for name, path in sorted(found.items()):
        total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:20]


def _reached(start: set[str], package: str) -> dict[str, Path]:
    """The modules of a package that some modules import, directly or not, with their files."""
    found: dict[str, Path] = {}
    todo = list(start)
    while todo:
        name = todo.pop()
        if name in found or not name.startswith(package):
            continue
        source = _source(name)
        if source is None:
            continue  # a name in a module
        found[name] = source
        todo += _imports(source, name)
    return found


@cache
def _source(name: str) -> Path | None:
    parts = name.split(".")
    root = importlib.util.find_spec(parts[0])
    assert root is not None and root.origin is not None
    place = Path(root.origin).parent.joinpath(*parts[1:])
    if len(parts) > 1 and place.with_suffix(".py").is_file():
        return place.with_suffix(".py")
    return place / "__init__.py" if (place / "__init__.py").is_file() else None


@cache
def _imports(path: Path, name: str) -> tuple[str, ...]:
    """Absolute names of all that a file imports, modules and what may be modules."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*above, *([node.module] if node.module else [])])
            names += [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
    return tuple(names)


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _versions() -> str:
    named = (f"{name} {_version(name)}" for name in PACKAGES)
    return ", ".join([f"python {sys.version_info.major}.{sys.version_info.minor}", *named])
