"""The rules' events that `transformers.Trainer` calls callbacks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .mixin import DeltaworksMixin


class DeltaworksCallback(TrainerCallback):
    """Tells rules of `attached`, `step_begin`, `step_end`, `epoch_end` and `finished`; the mixin adds it by itself.

    `gradients` has no callback of its own, clipping comes before `on_pre_optimizer_step`; the mixin tells of it.
    """

    def __init__(self, trainer: DeltaworksMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.begin()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.rules.emit("step_begin")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The trainer clears the gradients before `on_step_end`.
        self.trainer.rules.emit("step_end")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A checkpoint of this step is written before `on_epoch_end`, and must know that the epoch has ended.
        if state.epoch is not None and state.epoch == int(state.epoch):
            self.trainer.rules.emit("epoch_end")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.rules.emit("finished")
