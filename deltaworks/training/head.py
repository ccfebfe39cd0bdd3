"""Next-token loss: under a frozen head without the logits, and of decoders whose own loss compares otherwise.

The logits of a batch, `tokens x vocabulary` in float32 with a copy for the gradient, are often the largest tensors of
a training step. A frozen head needs none of them kept: chunk by chunk, the loss and the gradient with respect to the
hidden states are computed together in the forward pass, and only that gradient (`tokens x width`) is saved. Positions
without a target never reach the head.

torch's own `linear_cross_entropy` does the same in general; on CPUs it was measured 2-4 times slower than the plain
loss, this one 0.7-1.0 times.

Most causal models compare a position with the label after it. Decoders that are cut out of a model with an encoder,
such as `BartForCausalLM`, compare it with the label that stands there, where our data have the token that was read:
for these the loss is always computed here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

from ..model.weights import is_ordinary

# Bytes of float32 logits held at a time: large enough for efficient products, small beside any model.
CHUNK_BYTES = 32 << 20
# Rows are filled up to a multiple of these: processors that compile a product for every shape then meet few of them.
ROWS = 64
# Configuration entries with which a model changes its logits after the head, or adds terms to the loss.
AFTER_THE_HEAD = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "z_loss_coefficient",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_router_logits",
    "unpadded_vocab_size",
)
_SHIFTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def causal_loss(
    model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None = None, call: Any = None
) -> Tensor | None:
    """The mean cross-entropy of the next token, where it is computed here; None where the model's own is right.

    Args:
        model, inputs, items, call: see `next_token_loss`.
    """
    head = head_of(model)
    if head is not None:
        return next_token_loss(model, head, inputs, items, call)
    if "labels" not in inputs or shifts(model):
        return None
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    logits = (call or model)(**inputs).logits
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=items)  # type: ignore[arg-type]


def shifts(model: nn.Module) -> bool:
    """Whether a model's own loss compares each position with the label after it.

    So does the loss that causal models have in common; whoever computes it otherwise is asked, with two tokens.
    """
    forwards = [inspect.unwrap(vars(cls)["forward"]) for cls in type(model).__mro__ if "forward" in vars(cls)]
    common = any("loss_function" in getattr(getattr(one, "__code__", None), "co_names", ()) for one in forwards)
    if common or getattr(model, "loss_type", None) != "ForCausalLM":
        return True
    if model not in _SHIFTS:
        _SHIFTS[model] = _asked(model)
    return _SHIFTS[model]


@torch.no_grad()
def _asked(model: nn.Module) -> bool:
    training = model.training
    device = next(model.parameters()).device
    ids, labels = torch.tensor([[1, 2]], device=device), torch.tensor([[-100, 2]], device=device)
    try:
        found = model.eval()(input_ids=ids, labels=labels, use_cache=False)
        before, at = nn.functional.cross_entropy(found.logits[0].float(), ids.new_tensor([2, 2]), reduction="none")
        return bool((found.loss - before).abs() <= (found.loss - at).abs())
    except (TypeError, ValueError, RuntimeError, IndexError):
        return True  # it reads something else than tokens, and knows best what its loss is
    finally:
        model.train(training)


def head_of(model: nn.Module) -> nn.Linear | None:
    """The head, if the loss may be computed without its logits; None where the model's own loss must be asked.

    It must be an ordinary linear layer that nothing changes or trains, and its output must be the logits. Where no
    gradients are computed, nothing trains.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    config = getattr(model, "config", None)
    if type(head) is not nn.Linear or not is_ordinary(head.weight) or config is None:
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters()):
        return None
    if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if any(getattr(text, name, None) not in (None, False, 1, 1.0) for name in AFTER_THE_HEAD):
        return None
    if getattr(config, "is_encoder_decoder", False) or getattr(model, "loss_type", None) not in (None, "ForCausalLM"):
        return None
    return head


def next_token_loss(
    model: nn.Module, head: nn.Linear, inputs: dict[str, Any], items: Tensor | int | None = None, call: Any = None
) -> Tensor:
    """The mean cross-entropy of the next token, as transformers' causal models compute it.

    Args:
        model: the model that owns `head`.
        head: what `head_of(model)` found.
        inputs: the model's keyword arguments with `labels` (`batch x length`, -100 for no target).
        items: number of targets to divide by (those of a whole accumulation window); this batch's own, if None.
        call: what to call instead of `model` (the same model, wrapped).
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    with _identity(head):
        hidden = (call or model)(**inputs).logits
    if (
        hidden.shape[-2] != labels.shape[-1]
    ):  # positions that no label is for, such as those of an image before the text
        return (call or model)(**inputs, labels=labels).loss
    targets = labels[..., 1:].reshape(-1)
    places = (targets != -100).nonzero().squeeze(1)
    hidden = hidden[..., :-1, :].flatten(0, -2)
    if len(places) < len(targets):
        hidden, targets = hidden.index_select(0, places), targets.index_select(0, places)
    count = items if items is not None else max(len(targets), 1)
    total = _FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets.to(hidden.device))
    return total / count  # type: ignore[operator]


@contextlib.contextmanager
def _identity(head: nn.Linear) -> Iterator[None]:
    # The model calls its head on the hidden states; for this call it gets them back.
    head.__dict__["forward"] = lambda hidden: hidden
    try:
        yield
    finally:
        del head.__dict__["forward"]


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum over rows of `logsumexp(h W^T + b) - (h W^T + b)[target]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        rows = max(ROWS, CHUNK_BYTES // (4 * weight.shape[0]) // ROWS * ROWS)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        count, padded = len(targets), -(-len(targets) // ROWS) * ROWS
        hidden = nn.functional.pad(hidden, (0, 0, 0, padded - count))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, padded, rows):
            chunk, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            logits = nn.functional.linear(chunk, weight.to(chunk.dtype), None if bias is None else bias.to(chunk.dtype))
            logits = logits.to(total.dtype)
            whole = logits.logsumexp(-1, keepdim=True)
            real = len(wanted)
            total += (whole[:real] - logits[:real].gather(1, wanted)).sum()
            if gradient is not None:
                probabilities = logits.sub_(whole).exp_()
                probabilities[:real].scatter_add_(1, wanted, torch.full_like(whole[:real], -1.0))
                torch.mm(probabilities.to(chunk.dtype), weight.to(chunk.dtype), out=gradient[start : start + rows])
        ctx.save_for_backward(None if gradient is None else gradient[:count])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None
