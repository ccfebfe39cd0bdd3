"""One side of the benchmark of finished adapters: what is done with a LoRA once it is trained, on a 7B-shaped base.

Attaching, saving, loading and switching need no weights: the parameters are views of memory of the full size that
is mapped and never written. Merging does need them: it runs on a few layers of the same shapes with weights in memory.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from .resident import Resident, resident

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SWITCHES = 10


def base(settings: dict[str, Any], layers: int, weights: Callable[[int], torch.Tensor]) -> nn.Module:
    """A Llama whose parameters are consecutive views of the one tensor that `weights(count)` gives."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["inner"],
        num_hidden_layers=layers,
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    flat = weights(sum(parameter.numel() for parameter in model.parameters()))
    start = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            view = flat[start : start + parameter.numel()].view(parameter.shape)
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
            start += parameter.numel()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def reserved(count: int) -> torch.Tensor:
    """Weights whose memory is mapped and never written: they take none."""
    return torch.empty(count, dtype=torch.bfloat16)


def in_memory(count: int) -> torch.Tensor:
    """Small random weights, a drawn stretch again and again."""
    flat, drawn = torch.empty(count, dtype=torch.bfloat16), 0.02 * torch.randn(1 << 22, dtype=torch.bfloat16)
    for start in range(0, count, len(drawn)):
        piece = flat[start : start + len(drawn)]
        piece.copy_(drawn[: len(piece)])
    return flat


def taken(work: Callable[[], Any], times: int = 1) -> dict[str, float]:
    """Median seconds of some work, and the peak resident memory it added."""
    before, watcher, seconds = resident(), Resident(), []
    watcher.start()
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds), "memory": max(watcher.stop() - before, 0)}


def filled(model: nn.Module) -> None:
    """Trained adapters change something: B, which starts at zero, gets small values."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def ours(settings: dict[str, Any], folder: str) -> dict[str, dict[str, float]]:
    """Our side."""
    import deltaworks as dw

    method, second, exported = dw.LoRA(rank=settings["rank"], alpha=16), Path(folder) / "own", Path(folder) / "peft"
    model = base(settings, settings["layers"], reserved)
    found = {"attach": taken(lambda: dw.attach(model, method, seed=0))}
    filled(model)
    found["save"] = taken(lambda: dw.save(model, second))
    found["load"] = taken(lambda: dw.load(model, second, name="second"))
    names = iter(["default", "second"] * SWITCHES)
    found["switch"] = taken(lambda: dw.activate(model, next(names)), SWITCHES)
    found["save in PEFT's format"] = taken(lambda: dw.save(model, exported, name="default", format="peft"))
    found["load PEFT's format"] = taken(lambda: dw.load(model, exported, name="third"))
    del model
    model = base(settings, settings["merged_layers"], in_memory)
    dw.attach(model, method, seed=0)
    filled(model)
    found["merge"] = taken(lambda: dw.merge(model))
    found["unmerge"] = taken(lambda: dw.unmerge(model))
    return found


def theirs(settings: dict[str, Any], folder: str) -> dict[str, dict[str, float]]:
    """PEFT's side; saving and loading are in its own format both times."""
    import peft

    second = str(Path(folder) / "peft")
    config = peft.LoraConfig(r=settings["rank"], lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    model: Any = base(settings, settings["layers"], reserved)
    wrapped: list[Any] = []
    found = {"attach": taken(lambda: wrapped.append(peft.get_peft_model(model, config)))}
    adapted = wrapped.pop()
    filled(adapted)
    found["save"] = taken(lambda: adapted.save_pretrained(second))
    found["load"] = taken(lambda: adapted.load_adapter(second, "second"))
    names = iter(["default", "second"] * SWITCHES)
    found["switch"] = taken(lambda: adapted.set_adapter(next(names)), SWITCHES)
    found |= {"save in PEFT's format": found["save"], "load PEFT's format": found["load"]}
    del adapted, model
    adapted = peft.get_peft_model(base(settings, settings["merged_layers"], in_memory), config)  # type: ignore[arg-type]
    filled(adapted)
    found["merge"] = taken(lambda: adapted.base_model.merge_adapter())
    found["unmerge"] = taken(lambda: adapted.base_model.unmerge_adapter())
    return found


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the side and report seconds and memory of everything it did, as `seconds WHAT` and `memory WHAT`."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with TemporaryDirectory() as folder:
        found = (ours if settings["side"] == "ours" else theirs)(settings, folder)
    return {f"{key} {what}": value for what, figures in found.items() for key, value in figures.items()}
