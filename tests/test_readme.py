"""README says what is true: its table is the registry, its Python runs."""

from __future__ import annotations

import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import typer

from deltaworks import cli

ROOT = Path(__file__).parent.parent


def test_the_table_of_methods_is_the_registry() -> None:
    catalogue = runpy.run_path(str(ROOT / "docs" / "catalogue.py"))
    text = (ROOT / "README.md").read_text()
    assert catalogue["written"](text) == text, "run python docs/catalogue.py"


@pytest.mark.parametrize("page", ["README.md", "docs/using.md"])
def test_the_python_interface_runs_as_printed(page, tmp_path, monkeypatch) -> None:
    pytest.importorskip("peft")
    from deltaworks.core import registry

    registry.methods()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # what a page registers goes with the test
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        module = types.ModuleType("a_page")
        monkeypatch.setitem(sys.modules, "a_page", module)
        exec(compile(block, page, "exec"), module.__dict__)


def test_every_option_that_the_pages_name_exists() -> None:
    shown = " ".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    known = {"--help"}
    for name in cli.COMMANDS:
        for option in typer.main.get_command(cli._app(name)).commands[name].params:
            known |= {*option.opts, *option.secondary_opts}
    scripts = " ".join(path.read_text() for folder in ("bench", "docs") for path in (ROOT / folder).glob("*.py"))
    known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', scripts))
    missing = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+[a-z])", shown)) - known
    assert not missing, sorted(missing)
