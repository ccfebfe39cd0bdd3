"""What a person describes in a YAML file: a recipe, a study or a search, read in one way."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

Described = TypeVar("Described")


class _Loader(yaml.SafeLoader):
    """YAML whose truths are true and false, as in YAML 1.2: the key `on`, of many methods, is a word."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read(
    path: str | Path, options: Mapping[str, Any], make: Callable[..., Described], *, kind: str, example: str
) -> Described:
    """`make(content, options)` of the mapping in a YAML file.

    Arguments:
        options: what wins over the file.
        kind: what the file describes, as errors call it.
        example: a key that such a file may have.

    Raises:
        OSError: when the file cannot be read.
        ValueError: one line that names the file, when it describes nothing of the kind.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a {kind}'s YAML file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is not a {kind}: a mapping of keys such as `{example}: ...` is needed")
    try:
        return make(content, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
