"""Adapters as files: Deltaworks' own artifact, HF PEFT's format in both directions, and what servers accept."""

from .store import inspect, load, save

__all__ = ["inspect", "load", "save"]
