"""What a search tries next.

`gp` is as near to AutoPEFT's sampler as Optuna has: independent Gaussian processes for the objectives with a Matern-5/2
kernel, a length scale for each variable, and the sparse axis-aligned prior of SAASBO (Eriksson & Jankowiak 2021,
arXiv:2103.00349) over them,
    tau ~ HalfCauchy(0.1),  rho_d ~ HalfCauchy(tau),
on objectives that went through a normal copula; the next point has the largest expected hypervolume improvement. What
differs from the paper: the rho_d are those of highest posterior density, found by gradient, where the paper draws 64
samples by NUTS (tau is summed out over a grid, so that sparsity is not fixed beforehand); the improvement is over the
observed values, not over denoised ones (the noise is fitted all the same); its reference point is Optuna's, 1.1 times
the worst, where the paper gives 26 % of the parameters and a score of 0.7; points that run meanwhile count as what is
believed of them, as Optuna does it.

Every configuration that any sampler gives is made valid: one that changes nothing, that is too large, or that was tried
before is replaced by a near one.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import norm
from torch import Tensor

from .space import COUNTED, Configuration, Space

TAUS = torch.logspace(-4, 1, 21, dtype=torch.float64)
"""Grid over which the global scale of the prior is summed out."""
TRIES = 300


def sparse_log_prior(model: Any) -> Tensor:
    """Log density, up to a constant, of a process's hyper-parameters: SAASBO's for the length scales.

    log sum_tau p(tau) prod_d HalfCauchy(rho_d; tau) over inverse squared length scales rho; scale and noise of the
    process have Optuna's own priors.
    """
    rho, scale, noise = model.inverse_squared_lengthscales, model.kernel_scale, model.noise_var
    taus = TAUS.to(rho)
    # HalfCauchy(x; s) = 2 / (pi s (1 + (x/s)^2)); the grid is even in log tau, hence the factor tau.
    log_tau = -torch.log(0.1 * (1 + (taus / 0.1) ** 2)) + taus.log()
    log_rho = -(taus[:, None].log() + torch.log1p((rho[None, :] / taus[:, None]) ** 2)).sum(-1)
    rest = scale.log() - scale + 0.1 * noise.log() - 30 * noise
    return torch.logsumexp(log_tau + log_rho, 0) + rest


def copula(values: np.ndarray) -> np.ndarray:
    """Values through a normal copula: ranks (means of equal ones) over n + 1, then the inverse normal distribution."""
    ranks = np.array([(values < one).sum() + ((values == one).sum() + 1) / 2 for one in values])
    return norm.ppf(np.clip(ranks / (len(values) + 1), 1e-4, 1 - 1e-4))


class SparseGPSampler(GPSampler):
    """Optuna's Gaussian processes with the sparse prior, on objectives through a copula."""

    def __init__(self, *, seed: int, n_startup_trials: int) -> None:
        super().__init__(seed=seed, n_startup_trials=n_startup_trials, warn_independent_sampling=False)
        if not hasattr(self, "_log_prior"):
            raise ImportError("this Optuna has no place for a prior; pip install 'optuna>=5,<6'")
        self._log_prior = sparse_log_prior

    def _sample_relative_impl(
        self, study: Study, completed_trials: list[FrozenTrial], *rest: Any, **more: Any
    ) -> dict[str, Any]:
        columns = [copula(np.array(values)) for values in zip(*(one.values for one in completed_trials), strict=True)]
        seen = []
        for one, values in zip(completed_trials, zip(*columns, strict=True), strict=True):
            shown = copy.copy(one)
            shown._values = [float(value) for value in values]
            seen.append(shown)
        return super()._sample_relative_impl(study, seen, *rest, **more)


class Valid(BaseSampler):
    """Another sampler whose configurations are made valid.

    Args:
        inner: proposes.
        space: of the search.
        fits: whether a configuration may be tried.
        tried: keys of configurations that were.
        seed: of what replaces proposals.
        first: whether proposals are drawn by chance, as the first ones of a search are.
    """

    def __init__(
        self, inner: BaseSampler, space: Space, fits: Callable[[Configuration], bool], tried: set[str], seed: int,
        *, first: bool,
    ) -> None:  # fmt: skip
        self.inner, self.space, self.fits, self.tried, self.first = inner, space, fits, tried, first
        self.chance = random.Random(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        varied = {name: one for name, one in search_space.items() if not one.single()}
        proposed: Configuration = {} if self.first else dict(self.inner.sample_relative(study, trial, varied))
        for name, one in search_space.items():
            if name not in proposed:
                drawn = self.first or isinstance(self.inner, (GPSampler, RandomSampler))
                proposed[name] = self._drawn(one) if drawn else self.inner.sample_independent(study, trial, name, one)
        return self.repaired(proposed)

    def repaired(self, proposed: Configuration) -> Configuration:
        """The proposal if it may be tried and was not, or else a near configuration."""
        if self._good(proposed):
            return proposed
        names = list(self.space.distributions)
        for attempt in range(TRIES):
            # Further away the longer nothing is found.
            changed = self.chance.sample(names, min(len(names), 1 + attempt * len(names) // TRIES))
            other = proposed | {name: self._drawn(self.space.distributions[name]) for name in changed}
            if self._good(other):
                return other
        if self.space.count() <= COUNTED:
            left = [one for one in self.space.every() if self._good(one)]
            if left:
                return self.chance.choice(left)
        raise ValueError("no configuration is left to be tried; give more methods, sizes or layers, or a higher bound")

    def _good(self, found: Configuration) -> bool:
        return not self.space.empty(found) and self.space.key(found) not in self.tried and self.fits(found)

    def _drawn(self, one: BaseDistribution) -> Any:
        if isinstance(one, FloatDistribution):
            return math.exp(self.chance.uniform(math.log(one.low), math.log(one.high)))
        return self.chance.randint(one.low, one.high)  # type: ignore[attr-defined]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(study, trial, state, values)


def make_sampler(name: str, seed: int, startup: int) -> BaseSampler:
    """One of `search_spec.SAMPLERS`."""
    if name == "gp":
        return SparseGPSampler(seed=seed, n_startup_trials=max(startup, 2))
    if name == "tpe":
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True)
    return RandomSampler(seed=seed)
