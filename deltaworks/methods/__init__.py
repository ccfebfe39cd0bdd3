"""The pages: one file a method, one folder a family. Each folder's docstring gives the idea its pages share.

Calling the package, `deltaworks.methods()`, gives the registry: slug -> method class.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.method import Method


class _Catalogue(ModuleType):
    def __call__(self) -> "dict[str, type[Method]]":
        from ..core.registry import methods

        return methods()


sys.modules[__name__].__class__ = _Catalogue
