"""Deltaworks: fine-tune a model by changing less of it.

    import deltaworks as dw
    tuned = dw.attach(model, dw.LoRA(rank=16, on="attention"))

Every method of the catalogue (`dw.methods()`) is also a name here: `dw.LoRA`, `dw.PiSSA`, ...
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import methods as _pages  # first, so that the function below keeps the name  # noqa: F401
from .core.attach import activate, attach, bake, detach, disable, freeze, merge, route, tuned, unmerge
from .core.attach import unfreeze_adapter as unfreeze
from .core.registry import make as method
from .core.registry import methods
from .core.tuned import Tuned

try:
    __version__ = version("deltaworks")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "Tuned",
    "activate",
    "attach",
    "bake",
    "detach",
    "disable",
    "freeze",
    "load",
    "merge",
    "method",
    "methods",
    "route",
    "save",
    "tuned",
    "unfreeze",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name in ("save", "load"):
        from . import adapters

        return getattr(adapters, name)
    if name == "training":  # imported when it is asked for: it needs transformers' and TRL's trainers
        import importlib

        return importlib.import_module(".training", __name__)
    for cls in methods().values() if name[:1].isupper() else ():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module 'deltaworks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(cls.__name__ for cls in methods().values())])
