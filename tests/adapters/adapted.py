"""What the tests of saved adapters share: adapted models, moved away from their start, and their exact state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.method import Method
from tests.families import FAMILIES


def adapted(family: str, method: Method, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model with an adapter whose values are not those of the start, and a batch for it."""
    model, batch = FAMILIES[family]()
    tuned = dw.attach(model, method, seed=0, **kwargs)
    move(tuned.parameters())
    return model, batch


@torch.no_grad()
def move(parameters: list[nn.Parameter] | list[Tensor], size: float = 0.1) -> None:
    """Add noise, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a failed load must leave alone."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: value.requires_grad for name, value in model.named_parameters()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "attached": "_deltaworks" in model.__dict__,
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is as it was, bit for bit."""
    after = state(model)
    assert {key: after[key] for key in ("flags", "types", "attached")} == {
        k: before[k] for k in ("flags", "types", "attached")
    }
    assert all(torch.equal(value, before["values"][name]) for name, value in after["values"].items())


def refused(model: nn.Module, folder: Path, load: Callable[..., Any] | None = None) -> str:
    """Loading fails with one clear line that names something in the folder, and the model is as it was."""
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, OSError)) as caught:
            (load or dw.load)(model, folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and len(message) < 1000, message
    assert_same(model, before)
    return message


def family(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model and a batch without labels."""
    model, batch = FAMILIES[name]()
    labels = batch.pop("labels", None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        batch["decoder_input_ids"] = labels
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return model.to(dtype).eval(), cast


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Any], *, padding: bool = False) -> Tensor:
    """Logits at the text's real tokens, with `padding` at all; PEFT's models give a prompt's as well."""
    found = model.eval()(**batch).logits
    mask = batch.get("attention_mask")
    if padding or found.dim() < 3 or mask is None or "decoder_input_ids" in batch:
        return found
    return found[:, found.shape[1] - mask.shape[1] :][mask.bool()]


def assert_agree(found: Tensor, wanted: Tensor, base: Tensor, tolerance: float = 1e-10) -> None:
    """The adapter did something, and the same; `tolerance` is relative and holds in float64."""
    if wanted.dtype == torch.float64:
        assert (wanted - base).abs().max() > 1e-3
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    else:
        assert (wanted - base).abs().max() > 1e-2
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def theirs_to_ours_to_theirs(
    name: str, config: peft.PeftConfig, folder: Path, dtype: torch.dtype = torch.float32, tolerance: float = 1e-10
) -> dw.Tuned:
    """What PEFT saves we load, and what we save of it PEFT loads; what was loaded here."""
    model, batch = family(name, dtype)
    padding = dtype == torch.float64
    base = logits(model, batch, padding=padding)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = peft.get_peft_model(model, config).to(dtype)
    move([value for value in theirs.eval().parameters() if value.requires_grad])
    wanted = logits(theirs, batch, padding=padding)
    theirs.save_pretrained(folder / "theirs")
    ours, _ = family(name, dtype)
    tuned = dw.load(ours, folder / "theirs")
    assert_agree(logits(ours, batch, padding=padding), wanted, base, tolerance)
    dw.save(ours, folder / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(family(name, dtype)[0], str(folder / "ours")).to(dtype)
    assert_agree(logits(again, batch, padding=padding), wanted, base, tolerance)
    return tuned


def ours_to_both(name: str, method: Method, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """What we save PEFT loads, and so do we."""
    model, batch = family(name, dtype)
    padding = dtype == torch.float64
    base = logits(model, batch, padding=padding)
    move(dw.attach(model, method, seed=0, **more).parameters())
    wanted = logits(model, batch, padding=padding)
    dw.save(model, folder, format="peft")
    theirs = peft.PeftModel.from_pretrained(family(name, dtype)[0], str(folder)).to(dtype)
    assert_agree(logits(theirs, batch, padding=padding), wanted, base)
    ours, _ = family(name, dtype)
    dw.load(ours, folder)
    assert_agree(logits(ours, batch, padding=padding), wanted, base)
