"""Optimisation steps made of forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .rule import Rule, Run

if TYPE_CHECKING:
    from .tuned import Tuned

Moving = Sequence[tuple[nn.Parameter, float]]
"""Tensors that move, each with its learning rate's factor."""
PIECE = 1 << 20
"""Numbers that are drawn at a time."""


class ZerothOrder(Rule):
    """Simultaneous perturbation (SPSA): two losses along a random direction stand for the gradient.

    The direction is made from a seed as often as it is needed and never kept. Parameters move in place: out by `eps`,
    back by `2 eps`, and home again; the small rounding this leaves is the same in every replay.

    Attributes:
        log: seed, projected gradient and learning rate of every step so far.
    """

    owns_step = True
    memory = ("log", "generator")

    def __init__(self, eps: float, *, weight_decay: float = 0.0) -> None:
        self.eps, self.weight_decay = eps, weight_decay
        self.generator = torch.Generator()
        self.log: list[tuple[int, float, float]] = []

    def attached(self, run: Run) -> None:
        self.generator.manual_seed(run.seed)

    @torch.no_grad()
    def own_step(self, run: Run, loss: Callable[[], Tensor], lr: float) -> Tensor:
        moving = _moving(run.tuned)
        seed = int(torch.randint(2**62, (), generator=self.generator))
        training = [module for module in run.tuned.model.modules() if module.training]
        run.tuned.model.eval()
        away = 0.0
        losses = []
        try:
            for distance in (self.eps, -2 * self.eps):
                _move(moving, seed, distance)
                away += distance
                losses.append(_everywhere(loss()))
        except BaseException:
            _move(moving, seed, -away)  # parameters must not stay at a point that was only tried
            raise
        finally:
            for module in training:
                module.training = True
        above, below = losses
        slope = float((above - below) / (2 * self.eps))
        self._update(moving, seed, slope, lr)
        self.log.append((seed, slope, lr))
        run.record("mezo.projected_gradient", slope)
        return (above + below) / 2

    @torch.no_grad()
    def replay(self, tuned: Tuned, log: Iterable[tuple[int, float, float]]) -> None:
        """Make logged steps again without any data: from the same start to the same parameters, bit for bit.

        Args:
            tuned: the adapter as it was before the first of these steps.
            log: `(seed, projected gradient, learning rate)` of each step, as in `log`.
        """
        moving = _moving(tuned)
        for seed, slope, lr in log:
            for distance in (self.eps, -2 * self.eps):
                _move(moving, seed, distance)
            self._update(moving, seed, slope, lr)

    def _update(self, moving: Moving, seed: int, slope: float, lr: float) -> None:
        """From below the point back to it, and on: the direction is drawn once for both."""
        for (parameter, rate), z in zip(moving, _directions(moving, seed), strict=True):
            parameter.add_(z, alpha=self.eps)
            if self.weight_decay and parameter.dim() > 1:
                parameter.mul_(1 - lr * rate * self.weight_decay)
            parameter.add_(z, alpha=-lr * rate * slope)


def _moving(tuned: Tuned) -> Moving:
    return [(parameter, group["lr"]) for group in tuned.parameter_groups(1.0) for parameter in group["params"]]


def _directions(moving: Moving, seed: int) -> Iterator[Tensor]:
    """z for one tensor after the other, from one generator a device."""
    generators: dict[torch.device, torch.Generator] = {}
    for parameter, _ in moving:
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        yield _normal(parameter, generators[parameter.device])


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, of a tensor's shape, dtype and device."""
    if like.device.type != "cpu":
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    # A processor draws normal numbers one by one, and looks up quantiles of sixteen random bits at thrice the speed.
    table, made = _quantiles(like.dtype), torch.empty(like.numel(), dtype=like.dtype)
    for piece in made.split(PIECE):
        bits = torch.empty(-(-len(piece) // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        torch.index_select(table, 0, bits.view(torch.uint16)[: len(piece)].to(torch.int32), out=piece)
    return made.view(like.shape)


@cache
def _quantiles(dtype: torch.dtype) -> Tensor:
    """65,536 quantiles of the standard normal distribution, each as probable, of variance 1."""
    with torch.inference_mode(False):
        places = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
        values = torch.special.ndtri(places)
        return (values / values.square().mean().sqrt()).to(dtype)


def _move(moving: Moving, seed: int, distance: float) -> None:
    for (parameter, _), z in zip(moving, _directions(moving, seed), strict=True):
        parameter.add_(z, alpha=distance)


def _everywhere(loss: Tensor) -> Tensor:
    """The loss over the batches of all processes, so that all of them make the same step."""
    loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loss)
        loss = loss / torch.distributed.get_world_size()
    return loss
