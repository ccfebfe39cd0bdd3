"""One side of the step benchmark, in a process of its own: `python -m bench.step_worker JSON`.

Builds a Llama of the given shape with random weights, applies the side, and reports the median seconds of a step
(forward, backward, optimizer step; for the frozen base forward and backward to the inputs only), the bytes autograd
saves for backward beyond the base's own parameters, and the resident set above the loaded base.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def adapt(model: nn.Module, settings: dict[str, Any]) -> tuple[nn.Module, list[nn.Parameter]]:
    """Apply the side; returns the model to call and what trains."""
    side = settings["side"]
    if side == "frozen":
        model.requires_grad_(False)
        return model, []
    if side == "full":
        return model, list(model.parameters())
    if side == "ours":
        import deltaworks as dw

        tuned = dw.attach(model, dw.method(settings["method"], **settings["settings"]), seed=0)
        return model, tuned.parameters()
    import peft

    config = getattr(peft, settings["config"])(task_type="CAUSAL_LM", **settings["settings"])
    wrapped = peft.get_peft_model(model, config)
    return wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad]


class Resident(threading.Thread):
    """Watches the peak resident set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, False

    def run(self) -> None:
        import psutil

        process = psutil.Process()
        while not self.stopped:
            self.peak = max(self.peak, process.memory_info().rss)
            time.sleep(0.002)


def saved_bytes(model: nn.Module, step: Any) -> int:
    """Bytes of distinct storages autograd keeps for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    total = sum(seen.values())
    loss.backward()
    return total


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the side and report its figures."""
    import psutil

    model = base(settings)
    process = psutil.Process()
    loaded = process.memory_info().rss
    called, parameters = adapt(model, settings)
    called.train()
    trained = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, settings["vocabulary"], (settings["batch"], settings["tokens"]), generator=generator)
    ids = ids.to(device())
    embed = model.get_input_embeddings()
    prompted = settings.get("config") in ("PromptTuningConfig", "PrefixTuningConfig")

    def forward() -> torch.Tensor:
        if settings["side"] == "frozen":
            return called(inputs_embeds=embed(ids).detach().requires_grad_(), labels=ids).loss
        if prompted:
            return called(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        return called(input_ids=ids, labels=ids).loss

    def step() -> None:
        loss = forward()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    watcher = Resident()
    watcher.start()
    times = []
    for _ in range(settings["steps"]):
        if device() == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if device() == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    watcher.stopped = True
    watcher.join()
    figures = {
        "seconds": statistics.median(times),
        "saved_bytes": saved_bytes(called, forward),
        "resident_above_base": max(watcher.peak - loaded, 0),
        "trainable": trained,
    }
    if device() == "cuda":
        figures["cuda_peak"] = torch.cuda.max_memory_allocated()
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
