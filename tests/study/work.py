"""A tiny study, for several test modules; imported by tests, so not a test module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaworks.study.spec import Study
from deltaworks.training import Recipe
from tests.training.conftest import prepared_base, prepared_data


def places(folder: Path) -> dict[str, str]:
    """Base and data, made in a folder when they are not there."""
    return {"base": prepared_base(folder, "llama"), "data": prepared_data(folder, "completions")}


def recipe(folder: Path, **keys: Any) -> Recipe:
    """A run of a second."""
    quick = {"steps": 3, "batch_size": 4, "device": "cpu", "samples": 0, "lr": 1e-2, "validation": 0.2}
    return Recipe.of(places(folder), quick, keys)


def study(folder: Path, **keys: Any) -> Study:
    """A comparison of two methods, one of them twice, on two pieces of work."""
    given: dict[str, Any] = {
        "title": "LoRA & <others>", "paper": "Nobody 2020", "expected": "nothing", "steps": 4, "batch_size": 4,
        "device": "cpu", "samples": 1, "sample_length": 3, "evaluate_every": 2, "validation": 0.2,
        "methods": ["lora", "ia3", {"method": "lora", "name": "nowhere", "settings": {"on": "nothing"}}],
        "axes": {"limit": [15, 25]}, "seeds": 2, "rates": 2, "rate_steps": 2, "rate_axes": [], "context_examples": 2,
        "domain": places(folder)["data"],
    }  # fmt: skip
    return Study.of(places(folder), given, keys)
