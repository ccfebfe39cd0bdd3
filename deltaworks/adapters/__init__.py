"""Adapters as files: Deltaworks' own artifact, HF PEFT's format in both directions, and what servers accept."""

from .store import inspect, load, save
from .vllm import check_vllm, export

__all__ = ["check_vllm", "export", "inspect", "load", "save"]
