"""The house is as ARCHITECTURE.md draws it: imports point one way, and a page knows only what a page may know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deltaworks"
# Each folder and the folders it may import from, beside itself.
BELOW = {
    "model": set(),
    "core": {"model"},
    "statistics": {"core", "model"},
    "methods": {"statistics", "core", "model"},
    "adapters": {"methods", "core", "model"},
    "data": {"nursery"},
    "nursery": {"data"},
    "training": {"adapters", "methods", "statistics", "core", "model", "data", "nursery"},
    "study": {"training", "adapters", "methods", "statistics", "core", "model", "data", "nursery"},
    "cli": {"study", "training", "adapters", "methods", "statistics", "core", "model", "data", "nursery"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 1)
PAGES = sorted(path for path in (PACKAGE / "methods").rglob("*.py") if path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """Modules a file imports, as absolute dotted names."""
    names: set[str] = set()
    package = ["deltaworks", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*start, *([node.module] if node.module else [])])
            names |= {whole} if node.module else {f"{whole}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0]
    others = {name.split(".")[1] for name in imported(path) if name.startswith("deltaworks.") and name.count(".")}
    others = {name for name in others if (PACKAGE / name).is_dir()} - {here}
    assert others <= BELOW[here], f"{path} imports {others - BELOW[here]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_imports_only_what_a_page_may_know(path: Path) -> None:
    for name in imported(path):
        assert not name.startswith(("safetensors", "json", "os", "pathlib", "peft")), name
        if name.startswith("deltaworks."):
            assert name.split(".")[1] in ("core", "statistics", "model", "methods"), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_begins_with_its_paper_and_stays_a_page(path: Path) -> None:
    text = path.read_text()
    first = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    assert path.stem == "full" or "arXiv:" in "\n".join(first), "the paper is not named"
    assert len(text.splitlines()) <= 180, "a page that grows lacks something in the core"


def test_every_folder_is_in_the_picture() -> None:
    picture = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    for folder in sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()):
        assert f"{folder}/" in picture, folder
