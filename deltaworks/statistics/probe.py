"""A short full fine-tune that is undone: where would this task move the weights?

Every parameter is stepped by its own optimizer the moment its gradient is complete, and the gradient is dropped, so the
probe needs the optimizer's two moments but never a full set of gradients. The base's values wait on the CPU and are put
back bit for bit, also when the probe fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..model.kinds import GRAFT
from ..model.weights import is_quantised
from .running import Batch, loss_of, untouched

T = TypeVar("T")


def probe(
    model: nn.Module,
    batches: Iterable[Batch],
    read: Callable[[Mapping[str, Tensor]], T],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
) -> T:
    """Fine-tune the whole base for a few AdamW steps, call `read`, and undo it.

    Args:
        model: trained in training mode and left as it was.
        batches: with labels, one a step; begun again when they run out.
        read: called with the model moved; receives the original values (on the CPU) by parameter name.
        steps: optimizer steps.
        lr: learning rate, constant; no weight decay.
        seed: seeds dropout.

    Returns:
        What `read` returns.

    Raises:
        ValueError: when the base is quantised, a batch gives no loss, or there is no batch.
    """
    own = {name: p for name, p in model.named_parameters() if GRAFT not in name.split(".")}
    fixed = [name for name, p in own.items() if is_quantised(p)]
    if fixed:
        raise ValueError(f"{fixed[0]} is quantised, so the base cannot be fine-tuned to probe it; load it unquantised")
    trained = {name: p for name, p in own.items() if p.is_floating_point()}
    pristine = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
    handles = []
    with untouched(model, train=True, seed=seed), torch.enable_grad():
        try:
            for parameter in trained.values():
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(_stepper(parameter, lr)))
            count = 0
            for batch in itertools.islice(itertools.cycle(batches), steps):
                loss_of(model, batch).backward()
                count += 1
            if not count:
                raise ValueError("no batch was given, so there is nothing to probe with")
            with torch.no_grad():
                return read(pristine)
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in trained.items():
                parameter.data.copy_(pristine[name])


def _stepper(parameter: nn.Parameter, lr: float) -> Callable[[Tensor], None]:
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=0.0)

    def step(_: Tensor) -> None:
        optimizer.step()
        parameter.grad = None

    return step


def cosines(before: Tensor, after: Tensor) -> Tensor:
    """The cosine between each row of two matrices (`rows x length`), in float32; 1 where both rows are zero.

    1 means that a neuron kept its direction, whatever its length did.
    """
    a, b = before.float(), after.float()
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(lengths > 0, (a * b).sum(-1) / lengths.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
