"""One side of the run benchmark, in a process of its own: `python -m bench.run_worker JSON`.

Fine-tunes a base with LoRA on rows of a JSONL file and saves the adapter, as a user's script would: `deltaworks.tune`
or TRL's `SFTTrainer` with a `peft_config`. Reports the seconds of the training loop and of the whole process (imports
included), its processor time, the peak resident set above that with the base loaded, and the tokens the loss counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .resident import Resident, resident, seconds_alive

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALPHA = 16


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """`deltaworks tune`, called as the command calls it."""
    from deltaworks.training import Recipe, tune

    given: dict[str, Any] = {key: settings[key] for key in ("base", "data", "output")} | {"epochs": 1}
    if settings["matched"]:
        given |= {key: settings[key] for key in ("batch_size", "lr", "max_length", "packing", "dtype", "seed")}
        given |= {"settings": {"rank": settings["rank"], "alpha": ALPHA}, "warmup": 0, "schedule": "constant"}
        given |= {"validation": 0, "samples": 0, "save_every": 0}
    else:
        given |= {"validation": settings["validation"]}
    if settings["liger"]:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # The head's loss is ours; Liger replaces norms, rotations and activations.
        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)
    loaded = 0
    watcher = Resident()

    def hear(event: str, **_: Any) -> None:
        nonlocal loaded
        if event == "base":
            loaded = resident()
            watcher.start()

    result = tune(Recipe.of(given), progress=hear)
    metrics = result.metrics
    return {
        "seconds": metrics["throughput"]["seconds"],
        "resident_above_base": watcher.stop() - loaded,
        "supervised": metrics["data"]["train"]["supervised"],
        "trainable": metrics["adapter"]["trainable"],
        "steps": metrics["steps"],
        "loss": ending([loss for _, loss in metrics["losses"]]),
    } | _peak(metrics["peak_memory_bytes"])


def theirs(settings: dict[str, Any]) -> dict[str, Any]:
    """TRL's documented way: `SFTTrainer(model, args=SFTConfig(...), train_dataset=..., peft_config=LoraConfig())`."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    given: dict[str, Any] = {"output_dir": settings["output"], "num_train_epochs": 1, "report_to": []}
    given |= {"disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    adapter: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    dtype = "auto"
    if settings["matched"]:
        dtype = getattr(torch, settings["dtype"])
        given |= {"per_device_train_batch_size": settings["batch_size"], "learning_rate": settings["lr"]}
        given |= {"max_length": settings["max_length"], "packing": settings["packing"], "seed": settings["seed"]}
        given |= {"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no"}
        given |= {"optim": "adamw_torch_fused", "pad_to_multiple_of": settings["pad_to_multiple_of"]}
        # No autocast over a base that is in half precision already, as ours has none.
        given |= {"gradient_checkpointing": False, "bf16": False, "weight_decay": 0.0, "max_grad_norm": 1.0}
        adapter |= {"r": settings["rank"], "lora_alpha": ALPHA, "target_modules": LINEAR}
    if settings["liger"]:
        given |= {"use_liger_kernel": True}
    rows = load_dataset("json", data_files=settings["data"], split="train")
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype)
    if torch.cuda.is_available():
        model = model.cuda()
    loaded = resident()
    watcher = Resident()
    watcher.start()
    trainer = SFTTrainer(
        model, SFTConfig(**given), train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(**adapter)
    )  # fmt: skip
    outcome = trainer.train()
    trainer.save_model()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "seconds": outcome.metrics["train_runtime"],
        "resident_above_base": watcher.stop() - loaded,
        "supervised": sum(label != -100 for row in trainer.train_dataset["labels"] for label in row),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "loss": ending([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]),
    } | _peak(peak)


def ending(losses: list[float]) -> float:
    """The mean loss of the last quarter of a run, where both sides should have come to the same."""
    return statistics.fmean(losses[-max(len(losses) // 4, 1) :])


def _peak(on_gpu: int) -> dict[str, int]:
    import torch

    return {"cuda_peak": on_gpu} if torch.cuda.is_available() else {}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the side and report its figures."""
    import torch

    torch.set_num_threads(settings["threads"])
    settings = settings | {"output": str(Path(tempfile.mkdtemp(dir=settings["folder"])) / "run")}
    figures = (ours if settings["side"] == "ours" else theirs)(settings)
    return figures | {"whole_seconds": seconds_alive(), "cpu_seconds": time.process_time()}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
