"""One training step on shapes: what it keeps, what it needs at most, what it computes.

The step is that of `tune`: the same loss, the same rules, the same optimizer, in the same order.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.tuned import Tuned
from ..training.head import head_of, next_token_loss
from .shapes import KINDS, Effort, Shapes

# Optimizer steps a planned run has; rules that follow a schedule are looked at near its beginning.
STEPS = 1000
OPTIMIZERS = ("adamw", "sgd", "adafactor")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step works on.

    Attributes:
        task: as in `model.loading.TASKS`.
        batch_size: examples.
        length: tokens of the longest example (for images nothing).
        target_length: tokens of the longest target (seq2seq).
        supervised: share of the tokens that have a target, 0 to 1.
        padded: some examples are shorter, so that a mask is needed.
        packed: rows of several documents, in which positions begin again and there is no mask.
    """

    task: str = "causal-lm"
    batch_size: int = 8
    length: int = 512
    target_length: int | None = None
    supervised: float = 1.0
    padded: bool = False
    packed: bool = False

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """A batch as `tune` gives it to the model."""
        config: Any = model.config
        if self.task == "image-classification":
            return {"pixel_values": self._pixels(config), "labels": torch.zeros(self.batch_size, dtype=torch.long)}
        text = config.get_text_config()
        special = getattr(text, "pad_token_id", None)
        ids = torch.randint(0, text.vocab_size, (self.batch_size, self.length))
        ids[ids == special] = (special or 0) + 1 if (special or 0) + 1 < text.vocab_size else 0
        mask = torch.ones_like(ids)
        if self.padded:
            mask[-1, -1] = 0
        batch: dict[str, Any] = {"input_ids": ids}
        if self.packed:
            half = max(self.length // 2, 1)
            positions = torch.cat([torch.arange(half), torch.arange(self.length - half)])
            batch |= {"position_ids": positions.repeat(self.batch_size, 1), "use_cache": False}
        else:
            batch["attention_mask"] = mask
        return batch | {"labels": self._labels(ids, config)}

    def _labels(self, ids: Tensor, config: Any) -> Tensor:
        if self.task == "regression" or getattr(config, "problem_type", None) == "multi_label_classification":
            many = () if config.num_labels == 1 else (config.num_labels,)
            return torch.zeros(self.batch_size, *many, dtype=torch.float32)
        if self.task == "sequence-classification":
            return torch.zeros(self.batch_size, dtype=torch.long)
        if self.task == "seq2seq":
            return torch.randint(1, config.vocab_size, (self.batch_size, self.target_length or self.length))
        labels = torch.zeros_like(ids) if self.task == "token-classification" else ids.clone()
        # The same share in every row: which positions these are does not matter.
        labels[:, : round((1 - self.supervised) * self.length)] = -100
        return labels

    def _pixels(self, config: Any) -> Tensor:
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(self.batch_size, getattr(config, "num_channels", 3), height, width, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step needs, in bytes, at the moment when it needs most.

    Attributes:
        weights: the base and what the method adds, with what either keeps beside.
        gradients: of trained tensors, as far as they are there at that moment.
        optimizer: its state.
        activations: what is kept for the backward pass and what is passing.
        logits: tensors as wide as the vocabulary.
        saved: what is kept between forward and backward pass beyond weights and optimizer state.
        effort: what is computed, from the loss to the new parameters.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    saved: int
    effort: Effort

    @property
    def peak(self) -> int:
        """Everything together."""
        return sum(getattr(self, kind) for kind in KINDS)


def step(
    shapes: Shapes, tuned: Tuned, work: Work, *, optimizer: str = "adamw", clip: float = 1.0,
    checkpointing: bool = False,
) -> Step:  # fmt: skip
    """Make a step of an adapter on shapes.

    Args:
        shapes: the mode in which the model was emptied and the adapter attached.
        tuned: the adapter.
        work: the batch.
        optimizer: one of `OPTIMIZERS`.
        clip: largest norm of the gradient, 0 for none.
        checkpointing: compute activations again in the backward pass.

    Raises:
        ValueError: one line, when the step cannot be made on shapes.
    """
    ledger, model = shapes.ledger, tuned.model
    if any(ledger.now[kind] for kind in KINDS if kind != "weights"):
        gc.collect()  # an earlier step's optimizer is part of a cycle
    model.train()
    model.config.use_cache = False  # type: ignore[union-attr]  # as the trainer sets it
    ledger.vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)  # type: ignore[union-attr,operator]
    with contextlib.ExitStack() as stack:
        if checkpointing:
            stack.enter_context(_checkpointed(model))
        stack.enter_context(shapes)
        parameters = tuned.parameters()
        made = _optimizer(optimizer, tuned, shapes.device.type)
        rules = tuned.run(STEPS, optimizer=made)
        rules.emit("attached")
        if rules.owner is None:
            _prime(made, parameters, shapes)
        ledger.purpose = "activations"
        for parameter in parameters:
            handle = parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.mark([p.grad] if p.grad is not None else [], "gradients")
            )
            stack.callback(handle.remove)
        stack.callback(setattr, ledger, "purpose", "weights")
        stack.callback(_forget_gradients, model)
        shapes.effort = Effort()
        stack.callback(setattr, shapes, "effort", None)
        ledger.forget()
        rules.emit("step_begin")
        inputs = work.inputs(model)
        if rules.owner is not None:
            model.eval()
            with torch.no_grad():
                rules.owner.own_step(rules.run, lambda: _loss(model, work.task, inputs), 1e-3)
            model.train()
            saved = 0
        else:
            loss = _loss(model, work.task, inputs)
            penalty = rules.penalty()
            loss = loss if penalty is None else loss + penalty.to(loss.device)
            saved = sum(ledger.now[kind] for kind in ("activations", "logits"))
            loss.backward()
            del loss, penalty
            rules.emit("gradients")
            if clip:
                nn.utils.clip_grad_norm_(parameters, clip)
            made.step()
        rules.emit("step_end")
        return Step(**ledger.peak, saved=saved, effort=shapes.effort)


def frozen(shapes: Shapes, model: nn.Module, work: Work) -> Effort:
    """What the frozen base computes: forward, and backward to its inputs."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    model.train()
    model.config.use_cache = False  # type: ignore[union-attr]
    effort = shapes.effort = Effort()
    with shapes, _differentiable_inputs(model):
        shapes.ledger.purpose = "activations"
        inputs = work.inputs(model)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = shapes.make(inputs["pixel_values"].shape, None, torch.float32).requires_grad_()
        _loss(model, work.task, inputs).backward()
    shapes.ledger.purpose, shapes.effort = "weights", None
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return effort


def _loss(model: nn.Module, task: str, inputs: dict[str, Any]) -> Tensor:
    head = head_of(model) if task == "causal-lm" else None
    if head is not None:
        return next_token_loss(model, head, inputs, inputs["labels"].numel())
    return model(**inputs).loss


def _optimizer(name: str, tuned: Tuned, device: str) -> torch.optim.Optimizer:
    groups = tuned.parameter_groups(1e-3)
    if name == "adamw":
        # torch itself takes the form for many tensors at once on GPUs, but not for tensors without values.
        return torch.optim.AdamW(groups, foreach=device == "cuda")
    if name == "sgd":
        return torch.optim.SGD(groups, foreach=device == "cuda")
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, scale_parameter=False, relative_step=False)
    raise ValueError(f"optimizer {name!r} cannot be planned; there is {', '.join(OPTIMIZERS)}")


def _prime(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], shapes: Shapes) -> None:
    """Let the optimizer make its state, as it is there from the second step on."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    shapes.ledger.mark(kept, "optimizer")


def _forget_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} cannot compute its activations again; leave out --checkpointing")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
        model.disable_input_require_grads()  # type: ignore[operator]  # enabling has switched that on


@contextlib.contextmanager
def _differentiable_inputs(model: nn.Module) -> Iterator[None]:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        yield
        return
    handle = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def again(work: Work, batch_size: int) -> Work:
    """The same work with another number of examples."""
    return replace(work, batch_size=batch_size)
