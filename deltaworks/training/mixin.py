"""Our part in `transformers.Trainer` and the trainers that TRL builds on it.

    trainer = dw.training.wrap(SFTTrainer)(model, args, train_dataset=..., processing_class=...)

where `model` is one that an adapter is attached to. What the mixin changes: the optimizer gets the method's own groups,
rules hear their events, penalties enter the loss, a rule may own the step, checkpoints hold the adapter and not the
base, and preference trainers take the model with its adapters off as their reference.
"""

from __future__ import annotations

import functools
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy

from ..core.attach import find_state, tuned
from ..core.rule import Rules, Run
from ..core.tuned import Tuned
from . import checkpoint as saved
from .callback import DeltaworksCallback
from .memory import keeping_freed
from .reference import Reference
from .unfused import acts_outside, is_fused, unfuse

_Base = Trainer if TYPE_CHECKING else object


class DeltaworksMixin(_Base):
    """Put before a trainer class: `class MySFT(DeltaworksMixin, SFTTrainer)`, or `wrap(SFTTrainer)`.

    Args:
        adapter: name of the adapter that is trained; the last one attached by default.

    Raises:
        ValueError: when nothing is attached, or PEFT is asked to attach something as well.
    """

    def __init__(self, model: Any = None, *args: Any, adapter: str | None = None, **kwargs: Any) -> None:
        self._adapter = adapter
        self._rules: Rules | None = None
        self._begun = False
        self._stepping = False
        self._window: list[dict[str, Any]] = []
        if not isinstance(model, nn.Module) or find_state(model) is None:
            kind = type(model).__name__
            raise ValueError(f"{type(self).__name__} trains an adapter, {kind} has none; call dw.attach first")
        if kwargs.get("peft_config") is not None:
            raise ValueError("the model has an adapter of its own already; leave peft_config out")
        handle = tuned(model, adapter)
        if _needs_reference(type(self)) and kwargs.get("ref_model") is None:
            kwargs["ref_model"] = Reference(model)
        with _as_adapted(model):
            super().__init__(model, *args, **kwargs)  # type: ignore[misc]
        if is_fused(model) and acts_outside(handle):
            unfuse(model, getattr(self.args, "temperature", None) or 1.0)
        if getattr(self.args, "disable_dropout", False):
            for part in handle.parts():
                part.stop_dropping()
        self.add_callback(DeltaworksCallback(self))

    @property
    def tuned(self) -> Tuned:
        """The handle on the adapter that is trained."""
        return tuned(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), self._adapter)

    @property
    def rules(self) -> Rules:
        """The rules of the run that is going on, or of the last one."""
        if self._rules is None:
            raise RuntimeError("rules exist while a run does; call train() first")
        return self._rules

    # Beginning and resuming

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._begun = False
        self._window = []  # what is left of a run that broke off within an accumulation window
        with keeping_freed(self.args.device):
            return super().train(*args, **kwargs)

    def begin(self) -> None:
        """Make the rules and tell them of `attached`; once per run."""
        if self._begun:
            return
        self._begun = True
        handle = self.tuned
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self._rules = Rules(handle.rules, Run(handle, optimizer, 0, self.state.max_steps, self.args.seed))
        names = ", ".join(type(rule).__name__ for rule in self._rules.rules if rule.sees_gradients)
        if names and self.args.fp16 and self.accelerator.scaler is not None:
            raise ValueError(f"fp16=True scales the gradients that {names} would see; train in bf16 or float32")
        self._rules.emit("attached")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Everything is read in one place, after the optimizer exists: a rule may have state that refers to it.
        if not (Path(resume_from_checkpoint) / saved.TENSORS).is_file():
            raise ValueError(f"{resume_from_checkpoint} is no checkpoint of an adapter: {saved.TENSORS} is missing")
        if saved.is_exported(Path(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} holds the adapter alone (save_only_model=True) and cannot be resumed; "
                "dw.load takes it up"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self.begin()
        self.rules.load_state_dict(_unpickled(folder / saved.RULES))
        saved.read_adapter(self.tuned, folder)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert optimizer is not None
        saved.restore_optimizer(optimizer, _unpickled(folder / saved.OPTIMIZER))
        self.lr_scheduler.load_state_dict(_unpickled(folder / saved.SCHEDULER))  # type: ignore[union-attr]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Resumed from the checkpoint of its last step, a run has nothing left to do.
        if self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    # The step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, with the method's own learning rates and decays.

        Raises:
            ValueError: for an optimizer that chooses its parameters itself.
        """
        if self.optimizer is None:
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[arg-type]
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or {
                "params",
                "model",
                "optimizer_dict",
            } & set(settings):
                raise ValueError(f"optim={self.args.optim} chooses its parameters itself; take adamw_torch, sgd, ...")
            groups = self.tuned.parameter_groups(self.args.learning_rate, self.args.weight_decay)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._stepping = True
        try:
            if self.rules.owner is not None:
                return self._owned_step(model, inputs, num_items_in_batch)
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._stepping = False
        if self.accelerator.sync_gradients:
            self._forget_others()
            self.rules.emit("gradients")
        return loss

    def _forget_others(self) -> None:
        """Drop the gradients of adapters that act but are not trained here, before they count for the clipping."""
        handle = self.tuned
        own = {id(parameter) for parameter in handle.parameters()}
        for name in handle.state.adapters:
            for parameter in tuned(handle.model, name).parameters() if name != handle.name else ():
                if id(parameter) not in own:
                    parameter.grad = None

    def _owned_step(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """Collect the window's batches, then let the owner make its step with their loss."""
        owner = self.rules.owner
        assert owner is not None
        self._window.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        # Differences of losses mean nothing when dropout draws anew for each.
        model.eval()

        def loss() -> Tensor:
            with torch.no_grad(), self.compute_loss_context_manager():
                terms = [self.compute_loss(model, dict(batch), num_items_in_batch=num_items) for batch in window]
            share = 1.0 if self._scaled(num_items) else 1.0 / len(window)
            total = torch.stack([term.detach().float().reshape(()) for term in terms]).sum() * share  # type: ignore[union-attr]
            return self.accelerator.reduce(total, "mean") if self.accelerator.num_processes > 1 else total  # type: ignore[return-value]

        result = owner.own_step(self.rules.run, loss, self.rules.run.rate)
        model.train()
        return result.detach().to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        penalty = self.rules.penalty() if self._stepping else None
        if penalty is None:
            return result
        # A loss that is already a sum over the whole window gets the penalty once, in shares.
        share = 1.0 / self.current_gradient_accumulation_steps if self._scaled(num_items_in_batch) else 1.0
        if isinstance(result, tuple):
            return (result[0] + share * penalty.to(result[0].device), *result[1:])
        return result + share * penalty.to(result.device)

    def _scaled(self, num_items: Any) -> bool:
        """Whether `compute_loss` gives a share of the window's loss, as the trainer itself decides it."""
        known = getattr(self, "loss_is_scaled_for_ga", None)
        if known is not None:
            return known
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # A resumed run does not repeat an evaluation; the random numbers it draws must not count.
        held = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            result = super().evaluate(*args, **kwargs)
        random.setstate(held[0])
        np.random.set_state(held[1])
        return result

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, as `dw.save` does; the base is not written. With `push_to_hub` it goes to the Hub, too."""
        folder = output_dir or self.args.output_dir
        if folder is not None:
            self._export(Path(folder))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _export(self, folder: Path) -> None:
        from ..adapters import save

        handle = self.tuned
        with saved.unsharded(handle):
            if self.args.should_save:
                save(handle, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        main, step = self.args.should_save, self.state.global_step
        run_folder = Path(self._get_output_dir(trial=trial))
        final = run_folder / f"checkpoint-{step}"
        with saved.replacing(final, main=main, wait=self.accelerator.wait_for_everyone) as folder:
            if self.args.save_only_model:
                self._export(folder)
            else:
                self._write_run(folder)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(final)
            if main:
                self._keep_callbacks()
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.args.push_to_hub:
            if self.args.hub_strategy != HubStrategy.END:
                self.save_model(_internal_call=True)  # what is pushed is the output folder, without its checkpoints
            self._push_from_checkpoint(str(final))
        if main:
            saved.rotate(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_run(self, folder: Path) -> None:
        """Write what a run needs to go on; every process must call it."""
        saved.write_adapter(self.tuned, folder, main=self.args.should_save)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert optimizer is not None
        state = saved.optimizer_state(optimizer)
        if self.args.should_save:
            torch.save(self.rules.state_dict(), folder / saved.RULES)
            torch.save(state, folder / saved.OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), folder / saved.SCHEDULER)  # type: ignore[union-attr]
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))

    def _keep_callbacks(self) -> None:
        """Write into the trainer's state what callbacks remember, such as the patience of early stopping."""
        held: dict[str, list[dict[str, Any]]] = {}
        for one in (*self.callback_handler.callbacks, self.control):
            if isinstance(one, ExportableState):
                held.setdefault(type(one).__name__, []).append(one.state())
        for name, states in held.items():
            self.state.stateful_callbacks[name] = states[0] if len(states) == 1 else states  # type: ignore[index]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        if not saved.fits(self.tuned, Path(best)):
            warnings.warn(
                f"{best} is from before {self.tuned.method.slug} exchanged parts, and its loss that of another model; "
                "the adapter stays as it is at the end",
                stacklevel=2,
            )
            return
        saved.read_adapter(self.tuned, Path(best))


@functools.cache
def wrap(trainer: type[Trainer]) -> Any:
    """A trainer class with our part in it.

    Args:
        trainer: `transformers.Trainer` or a subclass of it, such as TRL's `SFTTrainer` and `DPOTrainer`.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise TypeError(f"wrap takes a trainer class, such as trl.SFTTrainer, not {trainer!r}")
    return trainer if issubclass(trainer, DeltaworksMixin) else type(trainer.__name__, (DeltaworksMixin, trainer), {})


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _needs_reference(trainer: type) -> bool:
    """Whether a trainer compares with a reference model, and would load a second one."""
    import inspect

    return "ref_model" in inspect.signature(_foreign(trainer).__init__).parameters


def _foreign(trainer: type) -> type:
    """The first class of a trainer that is not ours."""
    return next(cls for cls in trainer.__mro__ if not issubclass(cls, DeltaworksMixin) and issubclass(cls, Trainer))


class _as_adapted:
    """While a trainer is made, tell transformers that adapters are there, so that it accepts a quantised base."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.had = model, model.__dict__.get("_hf_peft_config_loaded")

    def __enter__(self) -> None:
        self.model._hf_peft_config_loaded = True  # type: ignore[assignment]

    def __exit__(self, *_: Any) -> None:
        del self.model._hf_peft_config_loaded
        if self.had is not None:
            self.model._hf_peft_config_loaded = self.had  # type: ignore[assignment]
