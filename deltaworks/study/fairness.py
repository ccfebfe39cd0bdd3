"""How a model does on each of several groups of the held-out rows, and how far they are apart.

FairTune (Dutt et al. 2023, arXiv:2310.05055) chooses what is trained by these figures; see `search`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from ..data import Prepared
from ..data.sources import open_source
from ..training.evaluation import batches, held_out
from ..training.recipe import Recipe
from ..training.tune import Opened
from .statistics import LEVEL, lower_is_better

WORST, GAP, OF = "worst_", "gap_", "group."
"""Figures over groups are called by what they are of: `worst_accuracy`, `gap_auc`, `group.old.accuracy`."""
APART = ("demographic_parity", "equalised_odds")
"""Differences between groups, for two classes: of the rate of positive answers, and the larger one of the differences
of true and of false positive rates."""
MERITS = ("accuracy", "auc", "rmse", "loss")
ENDS = (".low", ".high")
"""Ends of the interval of a figure over groups: `group.old.accuracy.low`, `worst_accuracy.high`."""
RESAMPLES = 1000


def less_is_better(figure: str) -> bool:
    """Which way a figure points, one over groups among them."""
    if figure.startswith(GAP) or figure in APART:
        return True
    if figure.startswith(WORST):
        return lower_is_better(figure.removeprefix(WORST))
    return lower_is_better(figure.rpartition(".")[2] if figure.startswith(OF) else figure)


def over_groups(figures: Mapping[str, float]) -> dict[str, float]:
    """Those of a run's figures that are of groups, or over them."""
    return {name: value for name, value in figures.items() if name.startswith((OF, WORST, GAP, *APART))}


@dataclass(frozen=True)
class Groups:
    """The groups of a run's held-out rows.

    Attributes:
        column: the data's column that says to which group a row belongs.
        names: one a held-out row, in order.
    """

    column: str
    names: tuple[str, ...]

    def half(self, chosen: range) -> Groups:
        """Of some of the rows only."""
        return Groups(self.column, tuple(self.names[index] for index in chosen))

    def figures(self, opened: Opened, batch_size: int, *, intervals: bool = False) -> dict[str, float]:
        """Figures of every group, and what they come to.

        Args:
            opened: the run whose held-out rows these are the groups of.
            batch_size: rows that are looked at together.
            intervals: whether to give the figures of classes their intervals, too (see `spread`).

        Returns:
            `group.NAME.FIGURE` for every group, with `group.NAME.rows`; `worst_FIGURE` and `gap_FIGURE` over them;
            for two classes the differences in `APART`. A group that lacks a class has no AUC, and does not count there.
        """
        assert opened.prepared.validation is not None
        rows: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            rows.setdefault(name, []).append(index)
        by_group: dict[str, dict[str, float]] = {}
        labels = opened.prepared.labels
        classes = opened.task in ("sequence-classification", "image-classification") and labels is not None
        if classes and labels.problem_type == "single_label_classification":  # type: ignore[union-attr]
            logits, truth = answers(opened.model, opened.prepared, batch_size, opened.device)
            chances = logits.softmax(-1)
            by_group = {name: merits(chances[chosen], truth[chosen]) for name, chosen in sorted(rows.items())}
            apart = differences([(chances[chosen], truth[chosen]) for chosen in rows.values()])
            if intervals:
                apart |= spread({name: (chances[chosen], truth[chosen]) for name, chosen in sorted(rows.items())})
        else:
            validation: Dataset = opened.prepared.validation
            for name, chosen in sorted(rows.items()):
                by_group[name] = held_out(
                    opened.model, opened.prepared, batch_size, opened.device, validation.select(chosen)
                )
            apart = {}
        undefined = [name for name, found in by_group.items() if math.isnan(found.get("auc", 0.0))]
        if undefined:
            warnings.warn(
                f"{self.column}: {', '.join(undefined)} lack a class among the held-out rows and have no AUC",
                stacklevel=2,
            )
        found = over(by_group) | apart
        for name, chosen in rows.items():
            found |= {f"{OF}{name}.rows": float(len(chosen))}
        return found


def over(by_group: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The figures of groups under one name each, with the worst and the distance between best and worst."""
    found: dict[str, float] = {}
    for name, figures in by_group.items():
        found |= {f"{OF}{name}.{figure}": value for figure, value in figures.items() if not math.isnan(value)}
    for figure in dict.fromkeys(one for figures in by_group.values() for one in figures):
        values = [figures[figure] for figures in by_group.values() if not math.isnan(figures.get(figure, math.nan))]
        if values:
            found[WORST + figure] = max(values) if lower_is_better(figure) else min(values)
            found[GAP + figure] = max(values) - min(values)
    return found


def merits(chances: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy, loss and AUC of one group.

    Args:
        chances: probabilities, `rows x classes`.
        truth: classes, `rows`.
    """
    return {
        "accuracy": float((chances.argmax(-1) == truth).double().mean()),
        "loss": float(-chances[torch.arange(len(truth)), truth].clamp_min(1e-30).log().mean()),
        "auc": auc(chances, truth),
    }


def auc(chances: Tensor, truth: Tensor) -> float:
    """Area under the curve: how often a row of a class has a higher chance of it than one of another class.

    Of two classes it is the usual one, of more the mean over classes against the rest; NaN where a class is missing.
    """
    classes = [1] if chances.shape[1] == 2 else range(chances.shape[1])
    areas = []
    for one in classes:
        inside, outside = chances[truth == one, one], chances[truth != one, one]
        if not len(inside) or not len(outside):
            return math.nan
        above = inside[:, None] - outside[None, :]
        areas.append(float(((above > 0).double() + 0.5 * (above == 0).double()).mean()))
    return sum(areas) / len(areas)


def differences(groups: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Demographic parity and equalised odds between groups of (chances, truth), for two classes at threshold 0.5."""
    if any(chances.shape[1] != 2 for chances, _ in groups):
        return {}
    rates: dict[str, list[float]] = {"positive": [], "true": [], "false": []}
    for chances, truth in groups:
        said = chances.argmax(-1).double()
        rates["positive"].append(float(said.mean()))
        for name, one in (("true", 1), ("false", 0)):
            if bool((truth == one).any()):
                rates[name].append(float(said[truth == one].mean()))
    spread = {name: max(values) - min(values) if values else 0.0 for name, values in rates.items()}
    return {"demographic_parity": spread["positive"], "equalised_odds": max(spread["true"], spread["false"])}


def spread(groups: Mapping[str, tuple[Tensor, Tensor]], seed: int = 0) -> dict[str, float]:
    """Percentile bootstrap intervals of what `merits` and `over` give, 95 %: how far other rows might have led.

    Rows are drawn anew within each group, for all figures together; a draw that leaves a class out has no AUC and does
    not count there. They say nothing of other seeds or of other training data.

    Args:
        groups: chances (`rows x classes`) and classes (`rows`) of each group.
        seed: of the draws.

    Returns:
        `group.NAME.FIGURE`, `worst_FIGURE` and `gap_FIGURE`, each with the ends of `ENDS`.
    """
    drawn: dict[str, list[np.ndarray]] = {}
    chance = np.random.default_rng(seed)
    found: dict[str, float] = {}
    for name, (chances, truth) in groups.items():
        count = len(truth)
        weights = torch.from_numpy(chance.multinomial(count, [1 / count] * count, size=RESAMPLES)).double()
        right = (chances.argmax(-1) == truth).double()
        loss = -chances[torch.arange(count), truth].clamp_min(1e-30).log()
        draws = {"accuracy": weights @ right / count, "loss": weights @ loss.double() / count}
        draws["auc"] = _auc_draws(chances.double(), truth, weights)
        for figure, values in draws.items():
            drawn.setdefault(figure, []).append(values.numpy())
            found |= _ends(f"{OF}{name}.{figure}", values.numpy())
    for figure, each in drawn.items():
        values = np.stack(each)
        values = values[~np.isnan(values).all(1)]
        if len(values):
            worst = values.max(0) if lower_is_better(figure) else values.min(0)
            found |= _ends(WORST + figure, worst) | _ends(GAP + figure, values.max(0) - values.min(0))
    return found


def _auc_draws(chances: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """`auc` of rows that count as often as `weights` (`draws x rows`) say, NaN where a class is missing."""
    areas = []
    for one in [1] if chances.shape[1] == 2 else range(chances.shape[1]):
        inside, outside = truth == one, truth != one
        above = chances[inside, one][:, None] - chances[outside, one][None, :]
        ahead = (above > 0).double() + 0.5 * (above == 0).double()
        pairs = weights[:, inside].sum(1) * weights[:, outside].sum(1)
        areas.append(((weights[:, inside] @ ahead) * weights[:, outside]).sum(1) / pairs)
    return torch.stack(areas).mean(0)


def _ends(name: str, draws: np.ndarray) -> dict[str, float]:
    known = draws[~np.isnan(draws)]
    if not len(known):
        return {}
    ends = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {name + end: float(value) for end, value in zip(ENDS, ends, strict=True)}


@torch.no_grad()
def answers(model: nn.Module, prepared: Prepared, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (`rows x classes`) and classes (`rows`) of the held-out rows."""
    assert prepared.validation is not None
    training = model.training
    model.eval()
    logits, truth = [], []
    try:
        for batch in batches(prepared.validation, prepared.collator, batch_size, device):
            logits.append(model(**batch).logits.double().cpu())
            truth.append(batch["labels"].cpu())
    finally:
        model.train(training)
    return torch.cat(logits), torch.cat(truth)


def groups_of(opened: Opened, recipe: Recipe, column: str) -> Groups:
    """The groups of a run's held-out rows, read from a column of the data that the run itself does not use.

    Raises:
        ValueError: when nothing is held out, the column is not there, there is one group only, or rows cannot be told
            apart any more after preparing.
    """
    held = opened.prepared.validation
    if held is None or opened.data.validation is None:
        raise ValueError(
            f"{recipe.data}: nothing is held out to be fair on; give validation a share, a file or a split"
        )
    if len(held) != len(opened.data.validation):
        raise ValueError(
            f"fairness over {column!r} needs one example a held-out row; {len(opened.data.validation)} rows became "
            f"{len(held)} examples (raise --max-length, or leave out the rows that do not fit)"
        )
    wanted = set(opened.data.places.get("validation", ()))
    named: dict[str, Any] = {}
    sources: list[Any] = [recipe.data]
    if isinstance(recipe.validation, str) and Path(recipe.validation).expanduser().exists():
        sources.append(recipe.validation)
    columns: set[str] = set()
    for source in sources:
        for split in open_source(source).values():
            for where, row in split.read():
                if where in wanted and isinstance(row, Mapping):
                    columns |= set(row)
                    named[where] = row.get(column)
    if column not in columns:
        raise ValueError(f"{recipe.data}: no column {column!r} to group by; there are {', '.join(sorted(columns))}")
    names = tuple(str(named.get(where)) for where in opened.data.places["validation"])
    if len(set(names)) < 2:
        raise ValueError(f"{recipe.data}: all held-out rows have {column}={names[0]}; two groups at least are needed")
    return Groups(column, names)
