"""Adapters as files: Deltaworks' own artifact, HF PEFT's format in both directions, and what servers accept."""

from .residual import export_residual
from .store import inspect, load, save
from .vllm import check_vllm, export

__all__ = ["check_vllm", "export", "export_residual", "inspect", "load", "save"]
