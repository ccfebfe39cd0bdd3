"""Which epoch it is, for collators that must know; a module of its own because trainers are slow to import."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .collate import MaskingCollator


class EpochCallback(TrainerCallback):
    """Tells a collator which epoch begins, counted from the optimizer steps as the trainer itself does on resuming."""

    def __init__(self, collator: MaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        batches = len(train_dataloader)
        steps = max(-(-batches // args.gradient_accumulation_steps), 1)
        self.collator.set_epoch(state.global_step // steps)
