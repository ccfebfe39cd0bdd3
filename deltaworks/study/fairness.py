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

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..data import Prepared
from ..data.sources import open_source
from ..training.evaluation import batches, held_out
from ..training.recipe import Recipe
from ..training.tune import Opened
from .statistics import lower_is_better

WORST, GAP, OF = "worst_", "gap_", "group."
"""Figures over groups are called by what they are of: `worst_accuracy`, `gap_auc`, `group.old.accuracy`."""
APART = ("demographic_parity", "equalised_odds")
"""Differences between groups, for two classes: of the rate of positive answers, and the larger one of the differences
of true and of false positive rates."""
MERITS = ("accuracy", "auc", "rmse", "loss")


def less_is_better(figure: str) -> bool:
    """Which way a figure points, one over groups among them."""
    if figure.startswith(GAP) or figure in APART:
        return True
    if figure.startswith(WORST):
        return lower_is_better(figure.removeprefix(WORST))
    return lower_is_better(figure.rpartition(".")[2] if figure.startswith(OF) else figure)


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

    def figures(self, opened: Opened, batch_size: int) -> dict[str, float]:
        """Figures of every group, and what they come to.

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
