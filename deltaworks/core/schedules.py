"""Budgets that change over a run."""

from __future__ import annotations

from .rule import Run


def window(run: Run, **times: float) -> tuple[int, int]:
    """The last step before a window in the run, and its last step.

    Args:
        run: whose length is known.
        times: what comes before the window and what comes after, as `Run.steps` reads times, by hyper-parameter.

    Raises:
        ValueError: when they leave no step between them.
    """
    before, after = (run.steps(time) for time in times.values())
    if before + after >= max(run.total_steps, 1):
        raise ValueError(
            f"{run.tuned.method.slug}: {' and '.join(times)} take {before} and {after} steps; "
            f"their sum must be below the run's {run.total_steps}"
        )
    return before, run.total_steps - after


def cubic(step: int, first: int, last: int) -> float:
    """What is left of a budget at a step: all until `first`, `(1 - t)^3` in the window, nothing after `last`."""
    return 1.0 if step <= first else 0.0 if step > last else (1 - (step - first) / (last - first)) ** 3
