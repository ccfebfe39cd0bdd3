"""Data sets built in a second or two from what is on every machine."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from deltaworks.nursery import corpus

SUMMARY_LENGTH = range(15, 201)
PACKAGES, PER_PACKAGE = 16, 200


@dataclass(frozen=True)
class Described:
    """A function or class of the standard library with its documentation string."""

    module: str
    header: str
    """Its `def` or `class` line, inside its class's line when it has one."""
    text: str


@cache
def described() -> tuple[Described, ...]:
    """Everything with a documentation string, in a fixed order. Read once per process."""
    found: list[Described] = []
    for document in corpus.sources():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in old modules
            try:
                tree = ast.parse(document.text)
            except SyntaxError:
                continue
        found.extend(_inside(tree, document.module, "", ""))
    return tuple(found)


def _inside(tree: ast.Module | ast.ClassDef, module: str, outer: str, indent: str) -> Iterator[Described]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            header = f"{indent}{_header(node)}"
            text = ast.get_docstring(node)
            if text:
                yield Described(module, outer + header, text)
            yield from _inside(node, module, f"{outer}{header}\n", indent + "    ")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Described(module, f"{outer}{indent}{_header(node)}", text)


def _header(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The definition's first line: decorators and body left out."""
    if isinstance(node, ast.ClassDef):
        bare: ast.stmt = ast.ClassDef(node.name, node.bases, node.keywords, [ast.Pass()], [])
    else:
        bare = type(node)(node.name, node.args, [ast.Pass()], [], node.returns)
    return ast.unparse(ast.fix_missing_locations(bare)).removesuffix("pass").rstrip()


def summary(text: str) -> str:
    """The first paragraph of a documentation string, on one line."""
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


def docstrings() -> DatasetDict:
    """A function's signature -> the first paragraph of its documentation string.

    Columns: `prompt`, the source up to and including the opening quotes; `completion`, the paragraph on one line;
    `module`. Split by module as `corpus` divides them, so the decoder's pre-training has not seen the validation rows.
    No completion occurs twice.
    """
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for split in rows:
        for item in described():
            last = item.header.rpartition("\n")[2]
            completion = summary(item.text)
            if (
                corpus.split_of(item.module) != split
                or not last.lstrip().startswith(("def ", "async def "))
                or len(completion) not in SUMMARY_LENGTH
                or not re.match(r"[A-Z][^(]* ", completion)
                or completion in seen
            ):
                continue
            seen.add(completion)
            indent = " " * (len(last) - len(last.lstrip()) + 4)
            prompt = f'{item.header}\n{indent}"""'
            rows[split].append({"prompt": prompt, "completion": completion, "module": item.module})
    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def packages() -> DatasetDict:
    """A documentation string -> the top-level package it is from.

    Columns: `text`, at most 600 characters, and `label`, a `ClassLabel` over the packages with the most documentation.
    A fifth of each package's texts, chosen by a hash of the text, is held out. No text occurs twice.
    """
    texts: dict[str, str] = {}
    for item in described():
        text = item.text.strip()[:600]
        if len(text) >= SUMMARY_LENGTH.start and not item.module.startswith("_"):
            texts.setdefault(text, item.module)
    frequent = Counter(texts.values()).most_common(PACKAGES)
    names = sorted(name for name, _ in frequent)
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    taken: Counter[str] = Counter()
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        name = texts[text]
        if name in names and taken[name] < PER_PACKAGE:
            # Every package gives its first texts in hash order, every fifth of them to validation.
            rows["validation" if taken[name] % 5 == 4 else "train"].append({"text": text, "label": names.index(name)})
            taken[name] += 1
    return DatasetDict({split: Dataset.from_list(found, features=features) for split, found in rows.items()})


def digits() -> DatasetDict:
    """Handwritten digits, 8 by 8 pixels (UCI's, from scikit-learn): `image` (PIL, grey) and `label`.

    The last fifth is held out: the file is ordered by writer, so most of its hands are new.

    Raises:
        ImportError: when scikit-learn or Pillow is missing.
    """
    try:
        from PIL import Image as Picture
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"nursery:digits needs {error.name}: pip install 'deltaworks[vision]'") from error
    source: Any = load_digits()
    pixels = (source.images * (255 / 16)).round().astype("uint8")
    images = [Picture.fromarray(image) for image in pixels]
    labels = source.target.tolist()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    first = len(images) * 4 // 5
    return DatasetDict(
        {
            split: Dataset.from_dict({"image": images[part], "label": labels[part]}, features=features)
            for split, part in (("train", slice(first)), ("validation", slice(first, None)))
        }
    )


SETS = {"docstrings": docstrings, "packages": packages, "digits": digits}
