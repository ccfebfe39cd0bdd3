"""Comparing methods on one's own base, data and budget."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model.loading import load_meta
from ..nursery import PREFIX, base_path
from ..training.recipe import Recipe
from ..training.tune import read_data
from . import sizes
from .engine import Hear, Runner
from .rates import Rates
from .rows import Row
from .scores import EXECUTED, GENERATED
from .spec import Cell, Entry, Study
from .statistics import LOWER, lower_is_better
from .trial import BASE, CONTEXT, Half, Kind, Trial
from .work import LIBRARY

Tell = Callable[..., None]
"""Called as `tell(event, **figures)`: "sizes" (entry, cell, note), "rates" and "runs" (done, total, of which cached),
"row" (name, seed, row) as runs end."""

FIGURES = ("accuracy", "rmse", "f1", "loss")
"""The figure that decides where none is named: the first of these that a run has."""
PROBE_STEPS = 6


@dataclass
class Comparison:
    """A finished study.

    Attributes:
        study: what was compared.
        rows: a flat record for each run: `cell`, `axis.NAME`, `method` (its name in the study), `slug`, `family`,
            `kind`, `seed`, `status`, `error`, `metric`, `lower` (whether less of it is better), `value`, `before`, the
            figures under `figure.NAME`, costs (`trainable`, `total`, `stored_bytes`, `peak_memory_bytes`,
            `step_seconds`, `step_flops`, `train_flops`, `example_flops`, `steps`), `lr`, `settings` (JSON), `note`,
            curves (`loss_steps`, `losses`, `evaluation_steps`, `evaluations`), `domain_before`, `domain_after`,
            `mergeable`, `needs_data`, `task`, `base`, `data`, `device`, `machine`, `key`.
        run: trials that were run for it.
        cached: trials that were known already.
    """

    study: Study
    rows: list[dict[str, Any]]
    run: int = 0
    cached: int = 0

    @property
    def cells(self) -> list[str]:
        """Names of the pieces of work, in order."""
        return list(dict.fromkeys(row["cell"] for row in self.rows))

    @property
    def names(self) -> list[str]:
        """What was compared, in order."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    def of(self, cell: str | None = None, name: str | None = None, *, done: bool = True) -> list[dict[str, Any]]:
        """Rows of a cell and a method, finished ones only unless told otherwise."""
        return [
            row
            for row in self.rows
            if cell in (None, row["cell"]) and name in (None, row["method"]) and (row["value"] is not None or not done)
        ]

    def values(self, cell: str, name: str) -> dict[object, float]:
        """The deciding figure by seed."""
        return {row["seed"]: row["value"] for row in self.of(cell, name)}

    def lower(self, cell: str) -> bool:
        """Whether less of a cell's figure is better."""
        return next((row["lower"] for row in self.rows if row["cell"] == cell), True)

    def metric(self, cell: str) -> str:
        """The figure that decides in a cell."""
        return next((row["metric"] for row in self.rows if row["cell"] == cell and row["metric"]), "loss")


def compare(study: Study, runner: Runner, *, tell: Tell = lambda event, **figures: None) -> Comparison:
    """Run a study: sizes to the budget, learning rates, then every method, seed and baseline on every piece of work.

    A run that fails is a row with its error. What was run before is not run again, so a study that was stopped goes on
    where it was.

    Raises:
        ValueError, OSError: when a study's base is not there, or its settings do not go together.
    """
    return _Comparing(study, runner, tell).all()


@dataclass
class _Job:
    """A method on a piece of work, as it is to be run."""

    cell: Cell
    entry: Entry
    changed: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


class _Comparing:
    def __init__(self, study: Study, runner: Runner, tell: Tell) -> None:
        self.study, self.runner, self.tell = study, runner, tell
        self.shapes: dict[tuple[str, str], Any] = {}
        self.tasks: dict[str, str | None] = {}
        self.fits: dict[str, sizes.Fit] = {}
        self.run_count, self.cached_count = 0, 0

    def all(self) -> Comparison:
        jobs = [_Job(cell, entry) for cell in self.study.cells() for entry in self.study.entries()]
        if self.study.budget is not None:
            for job in jobs:
                self._equalise(job)
        self._choose_rates(jobs)
        trials = [*self._baselines(), *(trial for job in jobs for trial in self._trials(job))]
        rows = {id(trial): row for trial, row in self._rows("runs", trials)}
        records = [record(trial, rows[id(trial)]) for trial in trials]
        return Comparison(self.study, records, self.run_count, self.cached_count)

    def _rows(self, stage: str, trials: list[Trial]) -> Iterable[tuple[Trial, Row]]:
        """Rows as they come, each told of."""
        done = cached = 0
        self.tell(stage, done=0, total=len(trials), cached=0)
        hear: Hear = lambda trial, event, figures: self.tell(event, trial=trial, **figures)  # noqa: E731
        for trial, row in self.runner.rows(trials, hear):
            done, cached = done + 1, cached + bool(row["cached"])
            self.run_count += not row["cached"]
            self.cached_count += bool(row["cached"])
            self.tell(stage, done=done, total=len(trials), cached=cached)
            self.tell("row", trial=trial, row=row, stage=stage)
            yield trial, row

    # Runs

    def _half(self) -> Half | None:
        """Where rates are chosen, it is by rows that nothing is reported on."""
        return None if self.study.rates == 0 else "reporting"

    def _baselines(self) -> list[Trial]:
        made = []
        for cell in self.study.cells():
            kinds: tuple[tuple[Kind, str], ...] = (("base", BASE), ("context", CONTEXT))
            for kind, name in kinds:
                if name not in self.study.baselines or (kind == "context" and not self._takes_examples(cell)):
                    continue
                for seed in self.study.all_seeds:
                    recipe = self.study.recipe(cell, Entry(name, {}), seed)
                    context = cell.context_examples if kind == "context" else 0
                    labels = {"cell": cell, "name": name}
                    domain = self._domain(cell) if kind == "base" else None
                    made.append(
                        Trial(
                            recipe=recipe, kind=kind, half=self._half(), context=context, domain=domain, labels=labels,
                            execute=cell.metric == EXECUTED,
                        )
                    )  # fmt: skip
        return made

    def _trials(self, job: _Job) -> list[Trial]:
        made = []
        for seed in self.study.all_seeds:
            recipe = self.study.recipe(job.cell, job.entry, seed, **job.changed)
            labels = {"cell": job.cell, "name": job.entry.name, "note": job.note}
            made.append(
                Trial(
                    recipe=recipe, half=self._half(), domain=self._domain(job.cell), labels=labels,
                    execute=job.cell.metric == EXECUTED,
                )
            )  # fmt: skip
        return made

    def _task(self, cell: Cell) -> str | None:
        """The task of a piece of work, as its data have it; None where they cannot be read, which runs will say."""
        if cell.keys.get("task") is None and cell.name not in self.tasks:
            try:
                self.tasks[cell.name] = read_data(self.study.recipe(cell, Entry(BASE, {}), 0))[0]
            except (ValueError, OSError, ImportError):
                self.tasks[cell.name] = None
        return cell.keys.get("task") or self.tasks[cell.name]

    def _takes_examples(self, cell: Cell) -> bool:
        """Whether examples in the prompt may be shown: only decoders' tasks have a prompt."""
        return self._task(cell) in (None, "causal-lm", "multiple-choice") and not cell.keys.get("packing")

    def _domain(self, cell: Cell) -> str | None:
        """The text on which forgetting is measured; the nursery's only where the model still predicts text."""
        predicts = self._task(cell) in (None, "causal-lm", "masked-lm", "multiple-choice")
        return None if cell.domain == LIBRARY and not predicts else cell.domain

    # Learning rates

    def _choose_rates(self, jobs: list[_Job]) -> None:
        """Give each job the rate with which its method did best in short runs on the choosing half."""
        if self.study.rates == 0:
            return
        given = self.study.rates if isinstance(self.study.rates, list) else []
        tries = self.study.rates if isinstance(self.study.rates, int) else len(given)
        alike: dict[tuple[Any, ...], list[_Job]] = defaultdict(list)
        for job in jobs:
            if "lr" not in job.entry.keys and "lr" not in job.cell.keys:
                alike[(self.study.rate_place(job.cell), job.entry.name)].append(job)
        made = {place: self.study.recipe(one.cell, one.entry, 0).made() for place, (one, *_) in alike.items()}
        searches = {place: Rates(method.default_lr, tries, given) for place, method in made.items()}
        while True:
            asked = {place: rate for place, search in searches.items() if (rate := search.ask()) is not None}
            if not asked:
                break
            trials = {place: self._short(alike[place][0], rate) for place, rate in asked.items()}
            places = {id(trial): place for place, trial in trials.items()}
            for trial, row in self._rows("rates", list(trials.values())):
                place = places[id(trial)]
                searches[place].tell(asked[place], cost(row, alike[place][0].cell.metric))
                if row["status"] == "failed" and not _diverged(row):
                    searches[place].tries = 0  # no rate will help
        for place, group in alike.items():
            best = searches[place].best()
            for job in group:
                # Without any rate that worked, the run with the method's own says what is wrong.
                job.changed["lr"] = best if best is not None else searches[place].start

    def _short(self, job: _Job, rate: float) -> Trial:
        """A short run on the half of the held-out rows that decides on settings."""
        share = self.study.rate_steps
        whole = self.study.recipe(job.cell, job.entry, self.study.all_seeds[0], **job.changed, lr=rate)
        length: dict[str, Any]
        if whole.steps is not None:
            length = {"steps": max(1, min(whole.steps, round(whole.steps * share if share < 1 else share)))}
        else:
            length = {"epochs": (whole.epochs or 1.0) * share} if share < 1 else {"steps": round(share)}
        quick = {"samples": whole.samples if job.cell.metric in GENERATED else 0, "evaluate_every": None}
        changed = job.changed | {"lr": rate} | quick | length
        recipe = self.study.recipe(job.cell, job.entry, self.study.all_seeds[0], **changed)
        labels = {"cell": job.cell, "name": job.entry.name}
        return Trial(recipe=recipe, half="choosing", labels=labels, execute=job.cell.metric == EXECUTED)

    # Budgets

    def _equalise(self, job: _Job) -> None:
        """Change a job's size, or its steps where the budget is time, so that it comes to the budget."""
        kind, budget = self.study.budgeted() or ("", 0.0)
        recipe = self.study.recipe(job.cell, job.entry, self.study.all_seeds[0])
        if kind == "time":
            job.changed |= {"steps": self._steps_for(job, budget)}
            job.note = f"{job.changed['steps']} steps in {budget:g} s"
            return
        fits = json.dumps([recipe.base, recipe.task, recipe.data, job.entry.keys, recipe.batch_size], default=str)
        if fits not in self.fits:
            self.fits[fits] = self._fit(job, recipe, kind, budget)
        fit = self.fits[fits]
        job.changed |= {"settings": fit.settings}
        job.note = fit.note
        self.tell("sizes", name=job.entry.name, cell=job.cell.name, note=fit.note)

    def _fit(self, job: _Job, recipe: Recipe, kind: str, budget: float) -> sizes.Fit:
        quantity = {"params": "trainable", "bytes": "saved_bytes"}.get(kind)
        if quantity is not None and not recipe.made().needs_data:
            measure = sizes.on_shape(self._shape(job, recipe), recipe.method, quantity)
            return sizes.fitted(recipe.method, recipe.settings, budget, measure, above=kind == "params")
        column = {"params": "trainable", "bytes": "stored_bytes", "memory": "peak_memory_bytes"}[kind]

        def probed(settings: dict[str, Any]) -> float | None:
            row = self._probe(job, settings=settings)
            return row.get(column) if row["status"] == "done" else None

        return sizes.fitted(recipe.method, recipe.settings, budget, probed, above=kind == "params", tries=9)

    def _steps_for(self, job: _Job, seconds: float) -> int:
        row = self._probe(job, steps=PROBE_STEPS)
        step = row.get("step_seconds")
        # What does not run here says so when it is run.
        return max(1, int(seconds / step)) if step else PROBE_STEPS

    def _probe(self, job: _Job, **changed: Any) -> Row:
        """A run of a few steps, for what it costs."""
        quick = {"steps": 2, "validation": 0, "samples": 0, "save_every": 0, "evaluate_every": None}
        try:
            recipe = self.study.recipe(job.cell, job.entry, self.study.all_seeds[0], **(quick | changed))
        except ValueError as error:
            return {"status": "failed", "error": str(error)}
        row = self.runner.run([Trial(recipe=recipe)])[0]
        self.run_count += not row["cached"]
        self.cached_count += bool(row["cached"])
        return row

    def _shape(self, job: _Job, recipe: Recipe) -> Any:
        """The base as a shape."""
        task = recipe.task or self._task(job.cell) or "causal-lm"
        if (recipe.base, task) not in self.shapes:
            place = str(base_path(recipe.base)) if recipe.base.startswith(PREFIX) else recipe.base
            self.shapes[recipe.base, task] = load_meta(place, task, trust_remote_code=recipe.trust_remote_code)
        return self.shapes[recipe.base, task]


def _diverged(row: Row) -> bool:
    """Whether a run failed for its loss, which another rate may mend."""
    return str(row["error"]).startswith("the loss is")


def cost(row: Row, metric: str | None) -> float | None:
    """The figure that decides, less being better; None for a run that has none."""
    figures = row.get("figures") or {}
    name = metric or decisive(figures)
    value = figures.get(name) if name else None
    if value is None or not math.isfinite(value):
        return None
    return value if lower_is_better(name) else -value  # type: ignore[arg-type]


def decisive(figures: dict[str, float]) -> str | None:
    """The figure that decides where none is named."""
    return next((name for name in FIGURES if name in figures), None)


def record(trial: Trial, row: Row) -> dict[str, Any]:
    """A run as a flat record of plain values."""
    cell: Cell = trial.labels["cell"]
    recipe = trial.recipe.complete()
    figures, before = row.get("figures") or {}, row.get("before") or {}
    error = row.get("error")
    metric = cell.metric or decisive(figures)
    value = figures.get(metric) if metric else None
    if row["status"] == "done" and value is None:
        error = f"there is no figure {metric!r}; there are {', '.join(figures) or 'none, nothing is held out'}"
    trained = trial.kind == "tune"
    method = recipe.made()
    return {
        "cell": cell.name,
        **{f"axis.{name}": label for name, label in cell.place.items()},
        "method": trial.labels["name"],
        "slug": method.slug if trained else trial.labels["name"],
        "family": method.family if trained else "baseline",
        "kind": trial.kind,
        "seed": recipe.seed,
        "status": row["status"] if error is None else "failed",
        "error": error,
        "metric": metric,
        "lower": metric in LOWER if metric else None,
        "value": None if value is None else float(value),
        "before": before.get(metric) if metric else None,
        "lr": recipe.lr if trained else None,
        "settings": json.dumps(recipe.settings if trained else {}, default=str),
        "note": trial.labels.get("note"),
        "trainable": row.get("trainable"),
        "total": row.get("total"),
        "stored_bytes": row.get("stored_bytes"),
        "peak_memory_bytes": row.get("peak_memory_bytes"),
        "steps": row.get("steps"),
        "step_seconds": row.get("step_seconds"),
        "step_flops": row.get("step_flops"),
        "train_flops": row["step_flops"] * row["steps"] if row.get("step_flops") else None,
        "example_flops": row.get("example_flops"),
        "domain_before": row.get("domain_before"),
        "domain_after": row.get("domain_after"),
        "loss_steps": [int(step) for step, _ in row.get("losses") or []],
        "losses": [float(loss) for _, loss in row.get("losses") or []],
        "evaluation_steps": [int(step) for step, _ in row.get("evaluations") or []],
        "evaluations": [found.get(metric) for _, found in row.get("evaluations") or []],
        **{f"figure.{name}": float(found) for name, found in figures.items()},
        "mergeable": method.mergeable if trained else True,
        "needs_data": method.needs_data if trained else False,
        "task": row.get("task") or recipe.task,
        "base": recipe.base,
        "data": recipe.data,
        "rows": row.get("rows"),
        "held_out": row.get("held_out"),
        "device": row.get("device"),
        "machine": row.get("machine"),
        "key": row.get("key"),
    }


def write(found: Comparison, folder: Path) -> None:
    """Write `results.parquet` (a row for each run) and `study.yaml`."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in found.rows for name in row))
    table = pyarrow.table({name: _column([row.get(name) for row in found.rows]) for name in columns})
    kept = {"study": json.dumps(found.study.as_dict(), default=str)}
    part = folder / ".results.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata(kept), part)
    part.replace(folder / "results.parquet")
    (folder / "study.yaml").write_text(found.study.text(), encoding="utf-8")


def _column(values: list[Any]) -> Any:
    import pyarrow

    # Whole numbers beside real ones are real numbers; a column of nothing has a type, too.
    if any(isinstance(value, float) for value in values):
        values = [float(value) if isinstance(value, int) else value for value in values]
    if all(value is None for value in values):
        return pyarrow.array(values, type=pyarrow.float64())
    return pyarrow.array(values)


def read(path: str | Path) -> Comparison:
    """A finished study: its folder, or the Parquet file in it.

    Raises:
        ValueError: when it is none.
    """
    import pyarrow
    import pyarrow.parquet

    path = Path(path)
    file = path / "results.parquet" if path.is_dir() else path
    try:
        table = pyarrow.parquet.read_table(file)
        study = json.loads((table.schema.metadata or {})[b"study"])
    except (OSError, pyarrow.ArrowInvalid, KeyError):
        raise ValueError(f"{path} holds no finished study: results.parquet of `deltaworks compare` is needed") from None
    return Comparison(Study.of(study), table.to_pylist())
