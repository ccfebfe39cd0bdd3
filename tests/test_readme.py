"""README says what is true: its table is the registry, its Python runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_table_of_methods_is_the_registry() -> None:
    catalogue = runpy.run_path(str(ROOT / "docs" / "catalogue.py"))
    text = (ROOT / "README.md").read_text()
    assert catalogue["written"](text) == text, "run python docs/catalogue.py"


def test_the_python_interface_runs_as_printed(tmp_path, monkeypatch) -> None:
    pytest.importorskip("peft")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
