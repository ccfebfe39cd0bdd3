"""One side of the step benchmark, in a process of its own: `python -m bench.step_worker JSON`.

Builds a Llama of the given shape with random weights, applies the side, and reports the median seconds of a step
(forward, backward, optimizer step; for the frozen base forward and backward to the inputs only), the bytes autograd
saves for backward beyond the base's own parameters, and the resident set above the loaded base.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .resident import Resident, resident

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLANNED = 1000  # steps of the run that a measured step is thought to be from


@dataclass
class Side:
    """What is measured.

    Attributes:
        model: the base.
        called: what is called instead of it.
        parameters: what trains; empty for the frozen base.
        tuned: our handle, for a method's rules.
    """

    model: nn.Module
    called: nn.Module
    parameters: list[nn.Parameter]
    tuned: Any = None


def base(settings: dict[str, Any]) -> nn.Module:
    """A random Llama of the shape asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["inner"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        max_position_embeddings=max(settings["tokens"], 64) + 64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device(), DTYPES[settings["dtype"]])


def device() -> str:
    """Where to measure."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def adapt(model: nn.Module, settings: dict[str, Any], batch: dict[str, torch.Tensor]) -> Side:
    """Apply the side."""
    side = settings["side"]
    if side == "frozen":
        model.requires_grad_(False)
        return Side(model, model, [])
    if side == "full":
        return Side(model, model, list(model.parameters()))
    if side == "ours":
        import deltaworks as dw

        method = dw.method(settings["method"], **settings["settings"])
        tuned = dw.attach(model, method, data=[batch] * 2 if method.needs_data else None, seed=0)
        return Side(model, model, tuned.parameters(), tuned)
    if side == "lycoris":
        return _lycoris(model, settings)
    import peft

    config = getattr(peft, settings["config"])(task_type="CAUSAL_LM", **settings["settings"])
    wrapped: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=not settings.get("low", False))
    return Side(model, wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad])


def _lycoris(model: nn.Module, settings: dict[str, Any]) -> Side:
    from lycoris import LycorisNetwork

    LycorisNetwork.apply_preset({"target_module": [], "target_name": [f"*.{name}" for name in settings["targets"]],
                                 "use_fnmatch": True})  # fmt: skip
    model.requires_grad_(False)
    network = LycorisNetwork(model, dropout=0, rank_dropout=0, module_dropout=0, **settings["settings"])
    network.apply_to()
    network.to(device())
    assert len(network.loras) == len(settings["targets"]) * settings["layers"]
    return Side(model, model, list(network.parameters()))


def loss_of(side: Side, settings: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the batch, with gradients towards the inputs where nothing else has any."""
    ids = batch["input_ids"]
    if settings["side"] == "frozen":
        embed: Any = side.model.get_input_embeddings()  # type: ignore[operator]
        return side.called(inputs_embeds=embed(ids).detach().requires_grad_(), labels=ids).loss
    if settings.get("loss") == "tune":
        from deltaworks.training.head import head_of, next_token_loss

        head = head_of(side.model)
        assert head is not None
        return next_token_loss(side.model, head, batch)
    if settings.get("config") in ("PromptTuningConfig", "PrefixTuningConfig"):
        return side.called(attention_mask=torch.ones_like(ids), **batch).loss
    return side.called(**batch).loss


def stepper(side: Side, settings: dict[str, Any], batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One training step of the side: forward, backward, optimizer, and whatever its method does beside them."""
    optimizer = torch.optim.AdamW(side.parameters, lr=1e-4, fused=True) if side.parameters else None
    rules = side.tuned.run(total_steps=PLANNED, optimizer=optimizer) if side.tuned is not None else None
    allocate = getattr(getattr(side.called, "base_model", None), "update_and_allocate", None)
    count = itertools.count()
    if rules is not None:
        rules.emit("attached")

    def loss() -> torch.Tensor:
        return loss_of(side, settings, batch)

    def step() -> None:
        if rules is not None:
            rules.step(loss)
            return
        loss().backward()
        if optimizer is None:
            return
        optimizer.step()
        if allocate is not None:  # AdaLoRA's part of a step, as PEFT asks its users to call it
            allocate(next(count))
        optimizer.zero_grad(set_to_none=True)

    return step


def saved(side: Side, loss: Callable[[], torch.Tensor]) -> int:
    """Bytes of distinct storages autograd keeps for backward, parameters and buffers left out."""
    from deltaworks.core.costs import saved_bytes  # after the resident set was measured, to which an import would add

    if side.tuned is not None and any(rule.owns_step for rule in side.tuned.rules):
        return 0  # its steps have no backward
    return saved_bytes(side.called, loss)


def batch_of(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tokens, which are their own labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, settings["vocabulary"], (settings["batch"], settings["tokens"]), generator=generator)
    return {"input_ids": ids.to(device()), "labels": ids.to(device())}


def timed(step: Callable[[], None], steps: int, loaded: int, warm: int = 2) -> dict[str, Any]:
    """Median seconds of a step after `warm` others, and the resident set above `loaded` bytes meanwhile."""
    for _ in range(warm):
        step()
    watcher = Resident()
    watcher.start()
    times = []
    for _ in range(steps):
        _wait()
        begin = time.perf_counter()
        step()
        _wait()
        times.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(times), "resident_above_base": max(watcher.stop() - loaded, 0)}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the side and report its figures."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    model = base(settings)
    loaded = resident()
    batch = batch_of(settings)
    side = adapt(model, settings, batch)
    side.called.train()
    with _allocator(settings):
        figures = timed(stepper(side, settings, batch), settings["steps"], loaded, settings.get("warm", 2))
    figures |= {
        "saved_bytes": saved(side, lambda: loss_of(side, settings, batch)),
        "trainable": sum(parameter.numel() for parameter in side.parameters),
    }
    if device() == "cuda":
        figures["cuda_peak"] = torch.cuda.max_memory_allocated()
    return figures


def _allocator(settings: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """What the C library does with what a step frees: the same on every side."""
    from deltaworks.training import keeping_freed

    return keeping_freed(device()) if settings.get("freed") == "kept" else contextlib.nullcontext()


def _wait() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
