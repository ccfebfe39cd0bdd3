"""SVFT: parameter-efficient fine-tuning with singular vectors (Lingam et al. 2024, arXiv:2405.19597).

W = U S V^T, n = min(in, out);  W' = W + g U M V^T with M n x n, zero outside a fixed pattern: its diagonal (`plain`),
a band (`banded`), as many entries anywhere (`random`), or those with the largest u_i . v_j (`top`, square layers only).
M = 0 and g = 1; `start="normal"` is the authors' code: N(0, 2 / k) under a trained gate, g = sigmoid(0) = 1/2, which
changes the output. Their code draws random entries with repetition and takes wrong products for `top`; this does not.
As in their scripts the diagonal has a rate of 5e-2, a band or `top` 5e-3; random entries have either there, 5e-3 here.
Use it for LoRA's quality with a fraction of its trained values; the bases take twice the weight's memory.
"""

import math

import torch
from torch import Tensor

from ...core import fields
from ...core.init import normal, zeros
from ...core.method import WeightMethod
from ...core.operators.singular import Singular, SparseMiddle, SpectrumShift, decomposed
from ...core.registry import method
from ...model.weights import Weight


@method("svft", paper="2405.19597", family="structured")
class SVFT(WeightMethod):
    """A sparse matrix between singular vectors; trains n values a layer, or `n (2 d + 1) - d (d + 1)`."""

    default_lr = 5e-2
    only = (("band", "pattern", ("banded", "random", "top")), ("seed", "pattern", ("random",)))

    pattern: str = fields.choice("plain", ["plain", "banded", "random", "top"], "which entries of M train")
    band: int = fields.positive(2, "d: entries with |i - j| <= d, or as many elsewhere; not for plain")
    start: str = fields.choice("zeros", ["zeros", "normal"], "zeros (no gate), or normal under a trained gate")
    seed: int = fields.whole(0, "of the entries; random only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != "plain":
            object.__setattr__(self, "default_lr", 5e-3)

    def delta(self, weight: Weight) -> Singular:
        n, size = min(weight.fan_in, weight.fan_out), (weight.fan_out, weight.fan_in)
        prints = zeros(n).to(weight.dense())
        if self.pattern == "plain" and self.start == "zeros":
            made = SpectrumShift(zeros(n), prints, *size)
        else:
            index, gated = self._places(weight, n), self.start == "normal"
            m = normal(len(index), std=math.sqrt(2 / len(index))) if gated else zeros(len(index))
            made = SparseMiddle(m, index, prints, *size, gate=torch.zeros(()) if gated else None)
        made.settle(weight)
        return made

    def _entries(self, n: int) -> int:
        d = 0 if self.pattern == "plain" else min(self.band, n - 1)
        return n * (2 * d + 1) - d * (d + 1)

    def _places(self, weight: Weight, n: int) -> Tensor:
        """Flat places in M, ascending."""
        if self.pattern == "top" and weight.fan_in != weight.fan_out:
            raise ValueError(
                f"svft: pattern='top' compares inputs with outputs, and {weight.path or 'a weight'} is "
                f"{weight.fan_out} x {weight.fan_in}; take banded or random"
            )
        if weight.device.type == "meta":  # only how many there are can matter to a base without weights
            return torch.arange(self._entries(n))
        if self.pattern == "random":
            generator = torch.Generator("cpu").manual_seed(self.seed)
            return torch.randperm(n * n, generator=generator, device="cpu")[: self._entries(n)].sort().values
        if self.pattern == "top":
            u, _, vh = decomposed(weight.dense())
            return (u.T @ vh.T).flatten().topk(self._entries(n)).indices.sort().values.cpu()
        points = torch.arange(n, device="cpu")
        near = (points.unsqueeze(1) - points).abs() <= (0 if self.pattern == "plain" else self.band)
        return near.flatten().nonzero().squeeze(1)

    def count(self, weight: Weight) -> int:
        n = min(weight.fan_in, weight.fan_out)
        return self._entries(n) + (self.start == "normal")
