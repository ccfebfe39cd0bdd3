"""Imported once by the server that trials are forked off, so that none of them imports it all again."""

import contextlib
import gc

import transformers.models.llama.modeling_llama  # noqa: F401

from ..core.registry import methods
from ..nursery import bases  # noqa: F401
from . import worker  # noqa: F401

with contextlib.suppress(ImportError):
    import sklearn.datasets  # noqa: F401 - the nursery's pictures and tables; takes a second

methods()
gc.freeze()  # what is there by now need not be searched in each process
