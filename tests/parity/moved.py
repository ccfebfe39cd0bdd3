"""PEFT's adapters that move the base, with that move made again in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.adapters.adapted import family, logits, move


@contextmanager
def in_double() -> Iterator[None]:
    """What PEFT makes anew is made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def double_twin(name: str, config: peft.LoraConfig, start: Path | None = None) -> tuple[Any, Tensor]:
    """PEFT's model of a family in float64, away from its start, and its logits.

    Args:
        start: where to save the adapter before it leaves its start, as PEFT's guide to conversion says.
    """
    theirs: Any = peft.get_peft_model(family(name)[0], config).double().eval()
    move_exactly(theirs, family(name, torch.float64)[0])
    if start is not None:
        given, theirs.peft_config["default"].init_lora_weights = config.init_lora_weights, True
        theirs.save_pretrained(start)
        theirs.peft_config["default"].init_lora_weights = given
    move([value for value in theirs.parameters() if value.requires_grad])
    return theirs, logits(theirs, family(name, torch.float64)[1])


@torch.no_grad()
def move_exactly(theirs: Any, pristine: nn.Module) -> None:
    """Take the start, as PEFT found it in float32, out of the base's weights in float64."""
    olora = theirs.peft_config["default"].init_lora_weights.lower() == "olora"
    for path, layer in theirs.base_model.model.named_modules():
        if "default" in getattr(layer, "lora_A", ()):
            start = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            turned = isinstance(layer.base_layer, Conv1D) and not olora
            exact = pristine.get_parameter(f"{path}.weight") - (start.T if turned else start)
            assert (layer.base_layer.weight - exact).abs().max() < 1e-5 < start.abs().max()
            layer.base_layer.weight.copy_(exact)
