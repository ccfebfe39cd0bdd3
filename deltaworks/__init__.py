"""Deltaworks: fine-tune a model by changing less of it.

    import deltaworks as dw
    tuned = dw.attach(model, dw.LoRA(rank=16, on="attention"))

Every method of the catalogue (`dw.methods()`) is also a name here: `dw.LoRA`, `dw.PiSSA`, ...
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import load, save
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

# Where the names that are not the core's `attach` module's live; all are imported when first used, and torch with them.
_ELSEWHERE = {
    "Tuned": ("core.tuned", "Tuned"),
    "load": ("adapters", "load"),
    "method": ("core.registry", "make"),
    "save": ("adapters", "save"),
    "unfreeze": ("core.attach", "unfreeze_adapter"),
}


def __getattr__(name: str) -> Any:
    if name in ("methods", "training"):  # packages; calling the package of pages lists them
        return import_module(f".{name}", __name__)
    if name in __all__:
        module, own = _ELSEWHERE.get(name, ("core.attach", name))
        return getattr(import_module(f".{module}", __name__), own)
    if name[:1].isupper():
        from .core.registry import methods

        for cls in methods().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'deltaworks' has no attribute {name!r}")


def __dir__() -> list[str]:
    from .core.registry import methods

    return sorted([*__all__, *(cls.__name__ for cls in methods().values())])
