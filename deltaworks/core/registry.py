"""The catalogue: slug -> method class."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from . import fields

if TYPE_CHECKING:
    from .method import Method

M = TypeVar("M", bound="type[Method]")
_REGISTRY: dict[str, type[Method]] = {}


def method(slug: str, *, paper: str, family: str) -> Callable[[M], M]:
    """Class decorator: makes a keyword-only dataclass of a method, checks its fields, and puts it in the catalogue.

    Args:
        slug: the name in recipes, on the command line and in files.
        paper: arXiv number, or a reference where there is none.
        family: the folder the page lives in.
    """

    def register(cls: M) -> M:
        made = dataclasses.dataclass(kw_only=True, frozen=True)(cls)
        made.slug, made.paper, made.family = slug, paper, family
        if slug in _REGISTRY and _REGISTRY[slug].__qualname__ != made.__qualname__:
            raise RuntimeError(
                f"two methods are called {slug!r}: {_REGISTRY[slug].__qualname__} and {made.__qualname__}"
            )
        _REGISTRY[slug] = made
        return made

    return register


def methods() -> dict[str, type[Method]]:
    """The registry: slug -> method class, in order of family and slug."""
    _load_pages()
    return dict(sorted(_REGISTRY.items(), key=lambda item: (item[1].family, item[0])))


def find(slug: str) -> type[Method]:
    """The method class of a slug; dashes and underscores are the same.

    Raises:
        ValueError: when there is no such method, naming the nearest.
    """
    import difflib

    known = methods()
    name = slug.replace("-", "_").lower() if isinstance(slug, str) else slug
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`deltaworks methods` lists them all"
    raise ValueError(f"there is no method {slug!r}; {hint}")


def make(slug: str, **settings: Any) -> Method:
    """A method by slug with hyper-parameters, as the command line and recipes name it.

    Raises:
        ValueError: for an unknown slug, an unknown hyper-parameter, or a value out of range.
    """
    cls = find(slug)
    return cls(**fields.parse(cls, settings))


_loaded = False


def _load_pages() -> None:
    global _loaded
    if _loaded:
        return
    pages = importlib.import_module("deltaworks.methods")
    for page in pkgutil.walk_packages(pages.__path__, "deltaworks.methods."):
        importlib.import_module(page.name)
    _loaded = True
