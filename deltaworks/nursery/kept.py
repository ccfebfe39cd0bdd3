"""What is made of the library once and then read from the cache: every run of a study is a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features


def kept(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON, from the cache if the same nursery has made it of the same Python before."""
    from deltaworks.nursery.bases import cache

    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    made_of = f"{hashlib.sha256(code).hexdigest()} {platform.python_version()} {sysconfig.get_path('stdlib')}"
    place = cache() / "nursery" / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(place.read_text(encoding="utf-8"))
    made = make()
    with contextlib.suppress(OSError):  # what cannot be kept is made again
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(made, file)
        os.replace(temporary, place)
    return made


def kept_set(name: str, make: Callable[[], DatasetDict]) -> DatasetDict:
    """A data set of texts and labels, kept as `kept` does."""

    def columns() -> dict[str, Any]:
        found = make()
        features = next(iter(found.values())).features
        return {"features": features.to_dict(), "splits": {split: rows.to_dict() for split, rows in found.items()}}

    held = kept(name, columns)
    features = Features.from_dict(held["features"])
    return DatasetDict({split: Dataset.from_dict(rows, features=features) for split, rows in held["splits"].items()})
