"""One run: base, data and method in; adapter, metrics and report out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from .. import adapters
from ..core.attach import attach, disable
from ..core.part import Trained
from ..core.tuned import Tuned
from ..data import Data, Prepared, check_packing, epoch_order, load, prepare
from ..data.lengths import StepwiseCollator, longest
from ..model.anatomy import describe
from ..model.loading import load_base, load_processor, load_tokenizer
from ..nursery import PREFIX, base_path
from . import report
from .checkpoint import latest, step_of
from .choices import choose
from .evaluation import batches, held_out, samples
from .head import causal_loss
from .memory import PeakMemory
from .mixin import DeltaworksMixin
from .recipe import Recipe, differing

Progress = Callable[..., None]
"""Called as `progress(event, **figures)`: "base", "data" and "adapter" when they are there, "before", "resumed",
"step" (step, total, loss, lr), "evaluated", "saved", "after", "done"; for terminals and logs."""

# What may differ between a run and its continuation: none of it changes what is learned.
FREE = ("output", "save_every", "keep", "evaluate_every", "samples", "sample_length", "device")
OPTIMIZERS = {
    "adamw": "adamw_torch_fused", "sgd": "sgd", "adafactor": "adafactor", "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
PART = ".deltaworks.part"  # a file while it is being written
HALF = (torch.bfloat16, torch.float16)
LABELLED_TEXT = ("sequence-classification", "regression", "token-classification")
LABELLED = (*LABELLED_TEXT, "image-classification")
STEPWISE = ("causal-lm", "masked-lm", "multiple-choice", *LABELLED_TEXT)


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        output: the folder with `adapter/`, `metrics.json`, `report.html` and `recipe.yaml`.
        metrics: the content of `metrics.json`.
        resumed: the step that the run went on from, None when it began at the beginning.
        finished_before: the run was finished already, nothing was done.
        tuned: the adapted model, None when nothing was done.
    """

    output: Path
    metrics: dict[str, Any]
    resumed: int | None = None
    finished_before: bool = False
    tuned: Tuned | None = field(default=None, repr=False)

    @property
    def adapter(self) -> Path:
        """The folder that `dw.load` takes."""
        return self.output / "adapter"

    @property
    def report(self) -> Path:
        return self.output / "report.html"

    @property
    def before(self) -> dict[str, float] | None:
        """Held-out figures of the base (with a new head as it began), None when nothing was held out."""
        return self.metrics["before"]

    @property
    def after(self) -> dict[str, float] | None:
        """The same figures of the adapted model."""
        return self.metrics["after"]


@dataclass(frozen=True)
class Opened:
    """What a run begins with: the data as the base reads them, and the base on its device, with a head for the labels.

    Attributes:
        data: rows as they were read.
        prepared: the same as batches are made of them.
        processor: the tokenizer, or for images their processor, None where the base has none.
        model: the base, nothing attached.
        arguments: the trainer's.
        memory: counts from before the base was loaded.
    """

    task: str
    data: Data
    prepared: Prepared
    processor: Any
    model: Any
    arguments: TrainingArguments
    memory: PeakMemory

    @property
    def device(self) -> torch.device:
        return self.arguments.device


def open_run(recipe: Recipe, tell: Progress = lambda event, **figures: None) -> Opened:
    """Read the data and load the base of a recipe, as `tune` does; the global seed is set to the recipe's.

    Raises:
        ValueError, OSError: as `tune`.
    """
    set_seed(recipe.seed)
    task, data, processor, prepared = read_data(recipe)
    tell("data", rows=len(prepared.train), held_out=len(prepared.validation or ()), task=task, prepared=prepared)
    place = str(base_path(recipe.base)) if recipe.base.startswith(PREFIX) else recipe.base
    arguments = _arguments(recipe, Path(recipe.complete().output or "") / "checkpoints", prepared)
    memory = PeakMemory(arguments.device)
    model = _base(place, task, prepared, arguments.device, recipe)
    if arguments.device.type == "cpu" and task in STEPWISE and next(model.parameters()).dtype in HALF:
        assert prepared.collator is not None
        bound = longest(prepared.train, prepared.validation)
        prepared = replace(prepared, collator=StepwiseCollator(prepared.collator, bound))
    tell("base", name=recipe.base, kind=type(model).__name__, device=str(arguments.device))
    return Opened(task, data, prepared, processor, model, arguments, memory)


def read_data(recipe: Recipe) -> tuple[str, Data, Any, Prepared]:
    """Task, rows, tokenizer or image processor, and examples of a recipe; of the base only its configuration is read.

    Raises:
        ValueError, OSError: as `tune`.
    """
    data = load(
        recipe.data, format=recipe.format, columns=recipe.columns, split=recipe.split, validation=recipe.validation,
        on_bad_row=recipe.on_bad_row,  # type: ignore[arg-type]
        limit=recipe.limit, seed=recipe.seed,
    )  # fmt: skip
    place = str(base_path(recipe.base)) if recipe.base.startswith(PREFIX) else recipe.base
    task = recipe.task or _task(data, place, recipe)
    processor = _processor(place, task, recipe)
    return task, data, processor, _prepared(data, task, processor, place, recipe)


def tune(
    recipe: Recipe, *, resume: bool = False, progress: Progress | None = None, opened: Opened | None = None
) -> Result:
    """Run a recipe.

    A run that was stopped at whatever moment and is resumed ends with the adapter of the run that was not: bit for bit
    on a CPU with the same number of threads.

    Args:
        recipe: what to do.
        resume: go on from the newest checkpoint in the output folder; from the beginning when there is none.
        progress: hears how far the run is.
        opened: what `open_run(recipe)` gave just before, when a caller has looked at it or changed what is held out.

    Raises:
        ValueError: one line, when recipe, base and data do not go together, when the output folder holds something and
            `resume` is not asked for, or when the loss stops being a number.
        OSError: when base or data cannot be read.
    """
    tell = progress or (lambda event, **figures: None)
    recipe = recipe.complete()
    assert recipe.output is not None
    output = Path(recipe.output)
    main = int(os.environ.get("RANK", "0")) == 0
    if _finished(recipe, output, resume=resume):
        tell("done", output=output)
        return Result(output, json.loads((output / "metrics.json").read_text(encoding="utf-8")), finished_before=True)

    opened = opened or open_run(recipe, tell)
    data, prepared, processor, task = opened.data, opened.prepared, opened.processor, opened.task
    model, device, memory, arguments = opened.model, opened.device, opened.memory, opened.arguments
    tuned = _attached(model, prepared, device, recipe)
    summary = tuned.summary()
    tell("adapter", method=recipe.method, trainable=summary.trainable, share=summary.share)
    # Only now: a recipe that does not fit its base and data leaves no folder behind.
    if main:
        output.mkdir(parents=True, exist_ok=True)
        _write(output / "recipe.yaml", recipe.text())

    def look() -> dict[str, Any]:
        return {
            "figures": held_out(model, prepared, recipe.batch_size, device) if prepared.validation else None,
            "samples": samples(model, prepared, processor, recipe.samples, recipe.sample_length, device),
        }

    def look_at_base() -> dict[str, Any]:
        # What trains in place begins as the base, which need not be put back for this.
        inside = all(isinstance(part, Trained) for part in tuned.parts())
        with contextlib.nullcontext() if inside else disable(model):
            return look()

    before = _once(output / "checkpoints" / "before.json", look_at_base, main=main)
    tell("before", figures=before["figures"])

    trainer = _Trainer(
        model, arguments, train_dataset=prepared.train, eval_dataset=prepared.validation,
        data_collator=prepared.collator, callbacks=[*prepared.callbacks, _Teller(tell)],
    )  # fmt: skip
    trainer.prepared, trainer.choice_loss = prepared, recipe.choice_loss
    trainer.remove_callback(PrinterCallback)
    start = latest(output / "checkpoints") if resume else None
    if start:
        tell("resumed", step=step_of(start))
    memory.forget()
    outcome = trainer.train(resume_from_checkpoint=str(start) if start else None)
    peak = memory.bytes()
    after = look()
    tell("after", figures=after["figures"])

    log = trainer.state.log_history
    seconds = outcome.metrics["train_runtime"]
    made = trainer.state.global_step - (step_of(start) or 0 if start else 0)
    metrics = {
        "task": task,
        "steps": trainer.state.global_step,
        "before": before["figures"],
        "after": after["figures"],
        "samples": {"before": before["samples"], "after": after["samples"]},
        "losses": [(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
        "evaluations": [(entry["step"], _stripped(entry)) for entry in log if "eval_loss" in entry],
        "history": trainer.rules.run.history,
        "data": prepared.description | {"skipped": [str(row) for row in (*data.skipped, *prepared.refused)]},
        "adapter": {
            "trainable": summary.trainable,
            "total": summary.total,
            "share": summary.share,
            "stored_bytes": tuned.summary().stored_bytes,
            "sites": [
                {"site": row.path, "part": row.kind, "shapes": row.shapes, "trainable": row.trainable}
                for row in summary.rows
            ],
        },
        "device": str(device.type),
        "peak_memory_bytes": peak,
        "throughput": {
            "seconds": seconds,
            "steps": made,
            "steps_per_second": made / seconds if seconds else 0.0,
            "examples_per_second": made * _window(arguments) / seconds if seconds else 0.0,
            "tokens_per_second": float(trainer.tokens) / seconds if seconds else 0.0,
        },
        "resumed_from": step_of(start) if start else None,
        "versions": _versions(),
        "recipe": recipe.as_dict(),
    }
    if main:
        adapters.save(tuned, output / "adapter")
        metrics = json.loads(json.dumps(metrics, default=_plain))
        _write(output / "report.html", report.page(metrics, recipe.text()))
        # Last: its being there says that the run is finished.
        _write(output / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    tell("done", output=output)
    return Result(output, metrics, resumed=step_of(start) if start else None, tuned=tuned)


# The output folder


def _finished(recipe: Recipe, output: Path, *, resume: bool) -> bool:
    """Look at the output folder; True when there is a finished run in it.

    Raises:
        ValueError: when it holds something that must not be overwritten, or the run of another recipe.
    """
    written = output / "recipe.yaml"
    if output.exists() and (not output.is_dir() or any(path.name != PART for path in output.iterdir())):
        if not resume:
            raise ValueError(f"{output} exists already; give another --output, or --resume to go on with the run in it")
        if not written.is_file():
            raise ValueError(f"{output} holds no run to resume: recipe.yaml is missing; give another --output")
        other = Recipe.read(written)
        differ = differing(recipe, other, FREE)
        if differ:
            key = differ[0]
            was, now = other.as_dict()[key], recipe.as_dict()[key]
            raise ValueError(f"{written} has {key}={was!r}, this recipe {now!r}; a run is resumed as it began")
        if (output / "metrics.json").is_file():
            return True
    return False


def _write(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    part = path.with_name(PART)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _once(path: Path, make: Callable[[], dict[str, Any]], *, main: bool) -> dict[str, Any]:
    """What `make` gives, kept in a file so that a resumed run need not make it again."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    made = make()
    if main:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(made))
    return made


def _plain(value: Any) -> Any:
    """What JSON cannot hold as what it can."""
    if isinstance(value, Tensor):
        return value.tolist()
    return str(value)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("deltaworks", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# Base and data


def _task(data: Data, place: str, recipe: Recipe) -> str:
    """What data of this shape are learned for, with this base.

    Raises:
        ValueError: for preference pairs, which need a trainer of TRL's.
    """
    if data.format == "preference":
        raise ValueError(
            f"{recipe.data} holds preference pairs; train on them with dw.training.wrap(trl.DPOTrainer), or name a task"
        )
    numbers = data.labels is not None and data.labels.problem_type == "regression"
    labelled = {
        "text-label": "regression" if numbers else "sequence-classification",
        "tokens-tags": "token-classification",
        "image-label": "image-classification",
        "prompt-choices": "multiple-choice",
    }
    if data.format in labelled:
        return labelled[data.format]
    config = _config(place, recipe)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    names = getattr(config, "architectures", None) or [""]
    return "masked-lm" if data.format == "text" and names[0].endswith("ForMaskedLM") else "causal-lm"


def _config(place: str, recipe: Recipe) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=recipe.trust_remote_code)
    except (OSError, ValueError):
        return None  # loading the base says what is wrong with it


def _processor(place: str, task: str, recipe: Recipe) -> Any:
    """The tokenizer, or for images their processor, None where the base has none."""
    if task != "image-classification":
        return load_tokenizer(place, trust_remote_code=recipe.trust_remote_code)
    try:
        return load_processor(place, trust_remote_code=recipe.trust_remote_code)
    except OSError:
        return None


def _prepared(data: Data, task: str, processor: Any, place: str, recipe: Recipe) -> Prepared:
    picture: dict[str, Any] = {}
    if task == "image-classification" and processor is None:
        config = _config(place, recipe)
        picture = {
            "image_size": getattr(config, "image_size", 224),
            "channels": getattr(config, "num_channels", 3),
        }
    return prepare(
        data, task, processor, max_length=recipe.max_length, packing=recipe.packing, seed=recipe.seed,
        completion_only=recipe.completion_only, mask_probability=recipe.mask, **picture,
    )  # fmt: skip


def _base(place: str, task: str, prepared: Prepared, device: torch.device, recipe: Recipe) -> Any:
    """The base on its device, with a head for the labels."""
    method = recipe.made()
    dtype = recipe.dtype
    if dtype is None and method.family == "fullparam" and not any(rule.owns_step for rule in method.rules()):
        dtype = "float32"  # steps of a usual learning rate vanish in half precision
    labels = prepared.labels if task in LABELLED else None
    with _quiet():
        model = load_base(
            place, task, quantize=recipe.quantize, dtype=dtype, device=device,
            id2label=labels.id2label if labels is not None else None, trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip
    if labels is not None:
        model.config.problem_type = labels.problem_type if task != "token-classification" else None
    if prepared.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = prepared.pad_token_id
    model.config._name_or_path = recipe.base
    if recipe.packing:
        check_packing(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and tables: what a base lacks is a new head, which is trained."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _attached(model: Any, prepared: Prepared, device: torch.device, recipe: Recipe) -> Tuned:
    """The model with the method in it; a head that the base does not bring trains along."""
    also = [recipe.also] if isinstance(recipe.also, str) else list(recipe.also or ())
    also += [re.escape(path) for path in describe(model).head_new]
    method = recipe.made()
    measured = None
    if method.needs_data:
        order = epoch_order(len(prepared.train), recipe.seed, 0)[: recipe.measure * recipe.batch_size]
        rows = prepared.train.select(order)
        measured = list(islice(batches(rows, prepared.collator, recipe.batch_size, device), recipe.measure))
    return attach(model, method, data=measured, also=also or None, seed=recipe.seed)


# Training


def _arguments(recipe: Recipe, folder: Path, prepared: Prepared) -> TrainingArguments:
    schedule = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
    known = {item.name for item in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    device = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"device={device!r} is not known; give cpu or cuda (CUDA_VISIBLE_DEVICES chooses the GPU)")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' was asked for, but torch sees no GPU; give cpu")
    evaluate = recipe.evaluate_every is not None and prepared.validation is not None
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs or 1.0,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.lr or 0.0,
        lr_scheduler_type=schedule,
        warmup_steps=recipe.warmup if recipe.warmup < 1 else int(recipe.warmup),
        optim=OPTIMIZERS[recipe.optimizer],
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        logging_steps=1,
        logging_nan_inf_filter=False,
        # A value below 1 is a share of all steps.
        save_strategy="no" if recipe.save_every == 0 else "steps",
        save_steps=recipe.save_every or 0.1,
        save_total_limit=recipe.keep,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.evaluate_every if evaluate else None,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=True,
        **{checkpointing: recipe.checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": False}},
        **prepared.arguments,
    )
    # Several GPUs in one process would be nn.DataParallel, which copies the model at every step; torchrun does better.
    _ = arguments.n_gpu
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _window(arguments: TrainingArguments) -> int:
    """Examples in one optimizer step."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


class _Measured(Trainer):
    """A trainer whose held-out figures are ours, that counts tokens, and that keeps no logits it can do without."""

    prepared: Prepared
    choice_loss: str
    _scaled: Callable[[Any], bool]
    tokens: Tensor | int = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_batch_samples(*args, **kwargs)
        for batch in found[0]:
            if "input_ids" in batch:
                mask = batch.get("attention_mask")
                self.tokens = self.tokens + (batch["input_ids"].numel() if mask is None else mask.sum())
        return found

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.prepared.task == "multiple-choice":
            loss = choose(model, inputs).loss(self.choice_loss)
            # A mean over this batch; where the trainer takes it for a share of the window's, it is made one.
            loss = loss / self.current_gradient_accumulation_steps if self._scaled(num_items_in_batch) else loss
            return (loss, {}) if return_outputs else loss
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        ours = self.prepared.task == "causal-lm" and not return_outputs
        loss = causal_loss(bare, inputs, num_items_in_batch, call=model) if ours else None
        if loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return loss * self.accelerator.num_processes if shared else loss

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        size, device = self.args.per_device_train_batch_size, self.args.device
        figures = held_out(self.model, self.prepared, size, device, eval_dataset)  # type: ignore[arg-type]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Trainer(DeltaworksMixin, _Measured):
    """The trainer of `tune`."""


class _Teller(TrainerCallback):
    """Passes on how far a run is, and stops one whose loss is no number."""

    def __init__(self, tell: Progress) -> None:
        self.tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise ValueError(
                f"the loss is {logs['loss']} at step {state.global_step}; "
                f"give a lower --lr than {args.learning_rate:g}, or a dtype with more range"
            )
        figures = {"step": state.global_step, "total": state.max_steps, "loss": logs["loss"]}
        self.tell("step", **figures, lr=logs.get("learning_rate"))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.tell("evaluated", step=state.global_step, figures=_stripped(metrics or {}))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell("saved", step=state.global_step)


def _stripped(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Held-out figures under their own names."""
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
