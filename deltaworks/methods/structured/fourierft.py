"""FourierFT: fine-tuning with the discrete Fourier transform (Gao et al. 2024, arXiv:2405.03003).

W' = W + alpha Re(ifft2(F)),  F is zero but for n trained coefficients c ~ N(0, 1) at fixed random entries, the same in
all layers of one shape. The grid is `out x in` as in the paper and `peft`; the authors' code takes `in x in`.
`center` prefers entries around that frequency: weights exp(-((D^2 - fc^2) / (D w))^2), D the distance from frequency 0.
Use it when an adapter must be tiny. Its rates are large, 1e-2 to 3e-1, as the transform divides by `out in`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ...core import fields
from ...core.init import normal, zeros
from ...core.method import WeightMethod
from ...core.operators.spectral import Spectral
from ...core.registry import method
from ...model.weights import Weight


@method("fourierft", paper="2405.03003", family="structured")
class FourierFT(WeightMethod):
    """A few trained spectral coefficients; trains `n` values a layer, at most `out * in`."""

    exact_at_start = False
    default_lr = 5e-2

    n: int = fields.positive(1000, "number of coefficients a layer")
    alpha: float = fields.number(300.0, "factor of the inverse transform", above=0)
    init: str = fields.choice("normal", ["normal", "zeros"], "starting coefficients; zeros leave the output unchanged")
    seed: int = fields.whole(2024, "seed of the entries")
    center: float | None = fields.number(None, "preferred frequency fc; none for no preference", low=0)
    width: float = fields.number(200.0, "width w of the preference", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center is None and self.width != type(self).width:
            raise ValueError(f"fourierft: width={self.width:g} is of a preferred frequency; give center as well")

    def delta(self, weight: Weight) -> Spectral:
        n = self.count(weight)
        c = normal(n) if self.init == "normal" else zeros(n)
        entries = chosen(weight.fan_out, weight.fan_in, n, self.seed, self.center, self.width)
        return Spectral(c, entries.clone(), weight.fan_out, weight.fan_in, scale=self.alpha)

    def group(self, name: str) -> dict[str, float]:
        return {"weight_decay": 0.0} if name == "c" else {}

    def count(self, weight: Weight) -> int:
        return min(self.n, weight.fan_out * weight.fan_in)


@lru_cache(maxsize=64)
def chosen(fan_out: int, fan_in: int, n: int, seed: int, center: float | None, width: float) -> Tensor:
    """Positions `j * in + k` of `n` different entries, drawn on the CPU whatever the default device."""
    with torch.device("cpu"):
        return _drawn(fan_out, fan_in, n, seed, center, width)


def _drawn(fan_out: int, fan_in: int, n: int, seed: int, center: float | None, width: float) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    if center is None:
        return torch.randperm(fan_out * fan_in, generator=generator)[:n].clone()
    rows, columns = (torch.fft.fftfreq(size) * size for size in (fan_out, fan_in))
    distance = (rows.square().unsqueeze(1) + columns.square()).sqrt().flatten().clamp_min(1e-6)
    log_weights = -(((distance.square() - center**2) / (distance * width)).square())
    # The largest of weights disturbed by Gumbel noise are a sample without replacement, for a grid of any size.
    noise = torch.rand(log_weights.shape, generator=generator).clamp_(1e-9, 1 - 1e-7).log_().neg_().log_().neg_()
    return (log_weights + noise).topk(n).indices
