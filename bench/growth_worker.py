"""One point of the growth benchmark: LoRA adapters, one or several, on a random Llama of the size asked for.

A step is forward, backward and optimizer step; with `mixed` it is a forward pass in which every example has an adapter
of its own, which is what PEFT offers for such batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .resident import resident
from .step_worker import Side, base, batch_of, device, loss_of, saved, stepper, timed

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(model: nn.Module, settings: dict[str, Any]) -> Side:
    """The model with `adapters` LoRA adapters, all acting and training."""
    names = [f"a{index}" for index in range(settings["adapters"])]
    rank = settings["rank"]
    if settings["side"] == "ours":
        import deltaworks as dw

        handles = [dw.attach(model, dw.LoRA(rank=rank, alpha=16), name=name, seed=0) for name in names]
        return Side(model, model, [parameter for handle in handles for parameter in handle.parameters()])
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    if settings["head"]:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # type: ignore[arg-type]
    wrapped: Any = peft.get_peft_model(model, config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.base_model.set_adapter(names)
    return Side(model, wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad])


def losses(side: Side, settings: dict[str, Any], batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The loss as each side's trainer computes it, where the head is what is looked at."""
    if settings["head"] and settings["side"] == "peft":
        return lambda: -side.called(**batch, fused_lm_head=True).log_probs.sum() / batch["labels"].numel()
    if settings["head"]:
        return lambda: loss_of(side, settings | {"loss": "tune"}, batch)
    return lambda: loss_of(side, settings, batch)


def mixed(side: Side, settings: dict[str, Any], batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A forward pass whose examples take the adapters in turn."""
    names = [f"a{index % settings['adapters']}" for index in range(settings["batch"])]
    side.called.eval()
    ids = batch["input_ids"]

    @torch.no_grad()
    def step() -> None:
        if settings["side"] == "ours":
            import deltaworks as dw

            with dw.route(side.model, names):
                side.model(input_ids=ids)
        else:
            side.called(input_ids=ids, adapter_names=names)

    return step


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the side and report its figures."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    model = base(settings)
    loaded = resident()
    batch = batch_of(settings)
    side = adapt(model, settings)
    side.called.train()
    loss = losses(side, settings, batch)
    if settings["mixed"]:
        step = mixed(side, settings, batch)
    elif settings["head"]:
        step = _training(side, loss)
    else:
        step = stepper(side, settings, batch)
    figures = timed(step, settings["steps"], loaded)
    if not settings["mixed"]:
        figures["saved_bytes"] = saved(side, loss)
    if device() == "cuda":
        figures["cuda_peak"] = torch.cuda.max_memory_allocated()
    return figures


def _training(side: Side, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(side.parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
