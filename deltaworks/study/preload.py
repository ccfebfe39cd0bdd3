"""Imported once by the server that trials are forked off, so that none of them imports it all again."""

import gc

import transformers.models.llama.modeling_llama  # noqa: F401

from ..core.registry import methods
from . import worker  # noqa: F401

methods()
gc.freeze()  # what is there by now need not be searched in each process
