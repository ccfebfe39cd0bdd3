"""SODA: spectrum-aware parameter-efficient fine-tuning for diffusion models (Zhang et al. 2024, arXiv:2405.21050).

W = U S V^T;  W' = U relu(S + delta) V^T (Q1 kron Q2 kron Q3)^T,  delta = 0 and every Q the identity at the start (the
official code starts delta at 1e-3). Q is moved by Adam on the Stiefel manifold (canonical metric) and projected back
after every step, so it stays orthogonal; everything else is left to the run's optimizer. The official delta is as long
as the output, which fails for wide ones; here min(in, out). `form="qr"` is the paper's other form, of which there is no
code: W = L Qb, L lower triangular;  W' = (L + B A) Qb (Q1 kron Q2 kron Q3)^T,  A Kaiming uniform, B = 0.
The official layer's factor and dropout, 1 and 0 in its scripts, act on the whole output, the base's share and bias
included; they are left out. Cross-attention is named by itself: on=["attention", "cross_attention"]. Its rate is
5e-5 for both, over 1000 steps of a diffusion model; ours is higher, for shorter runs of language models.
Use it to personalise a diffusion model: spectrum and directions move, and the weight keeps its geometry.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.turned_spectrum import TurnedFactor, TurnedSpectrum
from ...core.registry import method
from ...core.rule import Rule, Run
from ...core.tuned import Tuned
from ...model.weights import Weight

OFFICIAL = {640: (8, 8, 10), 768: (6, 8, 16), 1280: (4, 16, 20), 2048: (4, 8, 64)}


@method("soda", paper="2405.21050", family="structured")
class SODA(WeightMethod):
    """A shifted spectrum behind a Kronecker rotation; trains `min(in, out) + n1^2 + n2^2 + n3^2` values a layer.

    As `qr` it is `rank (min(in, out) + out)` values instead of `min(in, out)`.
    """

    refuses = ("mamba",)
    everywhere = ("beta1", "beta2")
    only = (("rank", "form", ("qr",)),)

    form: str = fields.choice("svd", ("svd", "qr"), "what is moved beside the directions: the spectrum, or L")
    rank: int = fields.positive(8, "inner dimension of L's change; qr only")
    beta1: float = fields.fraction(0.9, "smoothing of the rotations' gradient")
    beta2: float = fields.fraction(0.999, "smoothing of its square")
    rotation_lr_scale: float = fields.number(1.0, "learning rate of the rotations relative to the run's", above=0)
    on: Any = fields.sites("attention")

    def delta(self, weight: Weight) -> TurnedSpectrum | TurnedFactor:
        fan_out, fan_in, n = weight.fan_out, weight.fan_in, min(weight.fan_in, weight.fan_out)
        q1, q2, q3 = (torch.eye(side) for side in sides(fan_in))
        prints = zeros(n).to(weight.dense())
        if self.form == "svd":
            made = TurnedSpectrum(zeros(n), q1, q2, q3, prints, fan_out, fan_in)
        else:
            a, b = kaiming(self.rank, n), zeros(fan_out, self.rank)
            made = TurnedFactor(a, b, q1, q2, q3, prints, fan_out, fan_in)
        made.settle(weight)
        return made

    def group(self, name: str) -> dict[str, float]:
        return {"lr_scale": self.rotation_lr_scale, "weight_decay": 0.0} if name in ("q1", "q2", "q3") else {}

    def rules(self) -> list[Rule]:
        return [Stiefel(self)]

    def count(self, weight: Weight) -> int:
        n = min(weight.fan_in, weight.fan_out)
        moved = n if self.form == "svd" else self.rank * (n + weight.fan_out)
        return moved + sum(side**2 for side in sides(weight.fan_in))


def sides(width: int) -> tuple[int, int, int]:
    """Three factors of a width, the authors' or those of smallest sum, ascending."""
    if width in OFFICIAL:
        return OFFICIAL[width]
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    triples = ((a, b, width // (a * b)) for a in divisors for b in divisors if width % (a * b) == 0)
    return min((t for t in triples if t[0] <= t[1] <= t[2]), key=sum)


class Stiefel(Rule):
    """Takes the rotations' gradients from the run's optimizer and makes their step on the manifold.

    Attributes:
        moments: for every rotation, by name, the smoothed skew gradient and the smoothed square of it.
        steps: number of steps made.
    """

    memory = ("moments", "steps")

    def __init__(self, method: SODA) -> None:
        self.method = method
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0
        self.warned = False

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        settings = run.settings()
        b1, b2, self.steps = self.method.beta1, self.method.beta2, self.steps + 1
        for name, q in rotations(run.tuned):
            if q.grad is None:
                continue
            skew = q.mT @ q.grad - q.grad.mT @ q
            mean, square = self.moments.get(name, (torch.zeros_like(skew), torch.zeros_like(skew)))
            mean = mean.to(skew) * b1 - (1 - b1) * skew
            square = square.to(skew) * b2 + (1 - b2) * skew.square()
            self.moments[name] = mean, square
            step = mean / (1 - b1**self.steps) / ((square / (1 - b2**self.steps)).sqrt() + 1e-5)
            u, _, vh = torch.linalg.svd(q + settings[id(q)]["lr"] * (q @ step))
            q.copy_(u @ vh)
            q.grad = None  # the run's optimizer passes over what has no gradient

    @torch.no_grad()
    def step_end(self, run: Run) -> None:
        if not self.warned and any(bool((s + shift < 0).any()) for s, shift in _spectra(run.tuned)):
            self.warned = True
            warnings.warn(
                "soda: a singular value was moved below zero, where it counts as zero and has no gradient any more; "
                "lower the learning rate if there are many",
                stacklevel=2,
            )


def rotations(tuned: Tuned) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of every rotation."""
    parts = tuned.of_kind(TurnedSpectrum, TurnedFactor)
    return ((f"{name}.{key}", part.get_parameter(key)) for name, part in parts for key in ("q1", "q2", "q3"))


def _spectra(tuned: Tuned) -> Iterator[tuple[Tensor, Tensor]]:
    parts = tuned.of_kind(TurnedSpectrum)
    return ((part.get_buffer("s"), part.get_parameter("shift")) for _, part in parts)
