"""Opening a base together with adapters, as several commands do."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def base_name(name: str) -> str:
    """A base's name as transformers takes it: nursery addresses become folders."""
    if name.startswith("nursery:"):
        from ..nursery import resolve

        return str(resolve(name))
    return name


def open_base(name: str, task: str, dtype: str | None = None, quantize: str | None = None) -> tuple[Any, Any]:
    """The model and its tokenizer or processor (None when it has none)."""
    from ..model.loading import load_base, load_processor, load_tokenizer

    place = base_name(name)
    model = load_base(place, task, dtype=dtype, quantize=quantize)
    try:
        processor = load_processor(place) if task == "image-classification" else load_tokenizer(place)
    except (OSError, ValueError):
        processor = None
    return model, processor


def open_tuned(
    adapter: Path, base: str | None, task: str, dtype: str | None = None, quantize: str | None = None
) -> tuple[Any, Any, Any]:
    """Model, tokenizer and adapter; the base is the one the adapter was trained on unless another is named."""
    from .. import adapters

    if base is None:
        base = (adapters.inspect(adapter)["base"] or {}).get("name")
        if not base:
            raise ValueError(f"{adapter} does not name its base; give it with --base")
    model, tokenizer = open_base(base, task, dtype, quantize)
    return model, tokenizer, adapters.load(model, adapter)


def fresh_folder(folder: Path) -> None:
    """Refuse to write over something.

    Raises:
        ValueError: when the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; give a folder that does not, so that nothing is overwritten")
