"""Searching: which methods, on which blocks, of which sizes; AutoPEFT (Zhou et al. 2024, arXiv:2301.12132).

Trials are short runs of the engine, judged by one half of the held-out rows; Optuna proposes and remembers them. What
nobody beats in both the figure and the cost is run at full length, judged by the other half, and saved as recipes. With
`fair` the figure is one over groups (FairTune, Dutt et al. 2023, arXiv:2310.05055): the inner loop trains what a mask
leaves, the outer loop chooses the mask.

    base: ./roberta
    data: reviews.csv
    methods: [pfeiffer, parallel_adapter, prefix_tuning, {method: lora, sizes: [2, 4, 8], settings: {on: attention}}]
    steps: 1000
    trials: 200
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import rankdata

from ..core.costs import size_on
from ..core.registry import make
from ..data import Labels
from ..model.loading import load_meta
from ..nursery import PREFIX, base_path
from ..training.tune import LABELLED, read_data
from .engine import Hear, Runner
from .fairness import WORST, less_is_better, over_groups
from .pareto import MOVABLE, Best, Found, write
from .rows import Row
from .samplers import Valid, make_sampler
from .scores import EXECUTED, GENERATED
from .search_spec import COSTS, Search
from .space import Configuration, make_space
from .trial import Half, Trial

Tell = Callable[..., None]
"""Called as `tell(event, **figures)`: "space" (configurations, choices), "trial" (number, status, value, cost, best,
done, total), "full" (done, total), and a run's own events with its trial."""

STORE = "search.db"
ENOUGH = 8
"""Finished trials from which on it is said which choices matter."""
GOES_ON = ("trials", "full", "title", "startup", "prune_after")
"""Keys that may differ when a search goes on."""


def search(
    search: Search,
    runner: Runner,
    folder: str | Path,
    *,
    storage: str | None = None,
    start_from: str | Path | None = None,
    tell: Tell = lambda event, **figures: None,
) -> Found:
    """Search, and write what was found into a folder.

    A search that was stopped at whatever moment goes on: its trials are in the storage, their rows in the runner's
    cache. A failed trial is a trial with its error. The same seed, and the same number of jobs, give the same search.

    Args:
        search: what to look for.
        runner: runs the trials; as many at once as it has jobs.
        folder: gets `search.db` (without another storage), `search.yaml`, `results.json`, `pareto.json` and `pareto/`.
        storage: URL of a database as SQLAlchemy takes it.
        start_from: folder of another search, whose best configurations are tried first.

    Raises:
        ValueError: when folder or storage hold another search, nothing fits the base, or no trial gave a figure.
        OSError: when base, data or folders cannot be read.
    """
    return _Searching(search, runner, Path(folder), storage, start_from, tell).all()


class _Searching:
    def __init__(
        self,
        search: Search,
        runner: Runner,
        folder: Path,
        storage: str | None,
        start_from: str | Path | None,
        tell: Tell,
    ) -> None:
        self.search, self.runner, self.folder, self.tell = search, runner, folder, tell
        self.run = 0
        recipe = search.recipe({})
        task, _, _, prepared = read_data(recipe)
        self.rows = len(prepared.train)
        if prepared.validation is None:
            raise ValueError(
                f"{recipe.data}: nothing is held out to choose by; give validation a share, a file or a split"
            )
        self.metric = search.metric or (_fair_metric(task) if search.fair else _plain_metric(task, prepared.labels))
        place = str(base_path(recipe.base)) if recipe.base.startswith(PREFIX) else recipe.base
        named = prepared.labels.id2label if prepared.labels is not None and task in LABELLED else None
        self.model = load_meta(place, task, id2label=named, trust_remote_code=recipe.trust_remote_code)
        self.space = make_space(
            search.entries(), self.model, layers=search.layers, rates=search.bounds, labelled=named is not None
        )
        self.largest = search.largest(sum(p.numel() for p in self.model.parameters()))
        self.sizes: dict[str, bool] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.study = self._opened(storage or f"sqlite:///{folder / STORE}")
        self.tried = {one.user_attrs["key"] for one in self._known()}
        if start_from is not None:
            self._transfer(Path(start_from))
        tell("space", configurations=self.space.count(), methods=[one.slug for one in self.space.choices],
             layers=self.space.layers, pieces=len(self.space.pieces))  # fmt: skip

    # The storage

    def _opened(self, storage: str) -> optuna.Study:
        """The study in the storage, made when it is not there.

        Raises:
            ValueError: when another search is there.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        wanted = {name: value for name, value in self.search.as_dict().items() if name not in GOES_ON}
        plain = json.loads(json.dumps(wanted, default=str))
        toward: list[Any] = ["minimize" if self._lower() else "maximize"] + ["minimize"] * (self.search.cost != "none")
        name = self.search.title or "search"
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=toward, load_if_exists=True)
        except Exception as error:  # whatever a database's driver says of a URL
            said = " ".join(str(error).split())
            raise ValueError(f"--storage {storage} cannot be opened: {said[:200]}") from None
        before = study.user_attrs.get("search")
        if before is None:
            study.set_user_attr("search", plain)
        elif before != plain:
            key = next(key for key in {**plain, **before} if plain.get(key) != before.get(key))
            raise ValueError(
                f"{storage} holds a search with {key}={before.get(key)!r}, this one has {plain.get(key)!r}; "
                "give another --output, or another --title"
            )
        return study

    def _known(self) -> list[FrozenTrial]:
        """Trials that were begun, the waiting ones left out."""
        return [one for one in self.study.get_trials(deepcopy=False) if "key" in one.user_attrs]

    def _orphans(self) -> list[optuna.Trial]:
        """Trials whose process of this machine has died; they are run again."""
        host, found = socket.gethostname(), []
        for one in self._known():
            owner, _, process = str(one.user_attrs.get("owner", "")).rpartition(":")
            if one.state == TrialState.RUNNING and owner == host and not _alive(int(process)):
                trial = optuna.Trial(self.study, one._trial_id)
                trial.set_user_attr("owner", _owner())
                found.append(trial)
        return found

    def _transfer(self, folder: Path) -> None:
        """Let the best configurations of another search be tried first.

        Raises:
            ValueError: when there is none, or none of them can be here.
        """
        file = folder / MOVABLE if folder.is_dir() else folder
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            other, best = content["space"], [one["configuration"] for one in content["best"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"--start-from {folder}: no finished search is there (pareto.json of `search`)") from None
        waiting = {json.dumps(one.system_attrs.get("fixed_params")) for one in self.study.get_trials(deepcopy=False)}
        taken = 0
        for configuration in best:
            moved = self.space.moved(configuration, other)
            if self.space.empty(moved) or not self._fits(moved):
                continue
            taken += 1
            key = self.space.key(moved)
            if key not in self.tried and json.dumps(moved) not in waiting:
                waiting.add(json.dumps(moved))
                self.study.enqueue_trial(moved, user_attrs={"origin": "transfer"})
        if not taken:
            raise ValueError(f"--start-from {folder}: none of its {len(best)} configurations can be in this search")

    # Trials

    def all(self) -> Found:
        running = {one.number: one for one in self._orphans()}
        while True:
            done = sum(one.state.is_finished() for one in self._known())
            want = min(self.runner.jobs, self.search.trials - done)
            while len(running) < want:
                asked = self._asked()
                if asked is None:
                    break
                running[asked.number] = asked
            if not running:
                break
            self._round(running)
            running = {}
        return self._finished()

    def _asked(self) -> optuna.Trial | None:
        """The next configuration to try, None when there is none that was not tried."""
        number = len(self.study.get_trials(deepcopy=False))
        # A sampler of its own for each trial: what it draws does not depend on when the search was stopped.
        seed = int.from_bytes(hashlib.sha256(f"{self.search.seed} {number}".encode()).digest()[:4], "big")
        complete = sum(one.state == TrialState.COMPLETE for one in self._known())
        first = complete < self.search.by_chance
        inner = make_sampler(self.search.proposing, seed, self.search.by_chance)
        self.study.sampler = Valid(inner, self.space, self._fits, self.tried, seed, first=first)
        try:
            trial = self.study.ask(self.space.distributions)
        except ValueError as error:
            for one in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if "key" not in one.user_attrs:
                    self.study.tell(one.number, state=TrialState.FAIL)
            if not self._known():
                raise ValueError(f"search: {error}") from None
            self.tell("exhausted", reason=str(error))
            return None
        key = self.space.key(trial.params)
        self.tried.add(key)
        trial.set_user_attr("key", key)
        trial.set_user_attr("owner", _owner())
        if "origin" not in trial.user_attrs:
            trial.set_user_attr("origin", "chance" if first else "model")
        return trial

    def _fits(self, found: Configuration) -> bool:
        """Whether a configuration is small enough, and can be attached at all."""
        key = self.space.key(found)
        if key not in self.sizes:
            decided = self.space.recipe(found)
            name = json.dumps([decided["method"], decided["settings"]], sort_keys=True)
            if name not in self.sizes:
                method = make(decided["method"], **decided["settings"])
                sized = size_on(self.model, method)
                # A refusal says no number; what depends on data cannot say one.
                self.sizes[name] = method.needs_data or sized.get("trainable", math.nan) <= self.largest
            self.sizes[key] = self.sizes[name]
        return self.sizes[key]

    def _round(self, running: dict[int, optuna.Trial]) -> None:
        """Run some trials side by side."""
        made = {}
        for number, one in running.items():
            try:
                made[number] = self._trial(one)
            except ValueError as error:
                self._ended(one, {"status": "failed", "error": str(error)})
        spent: dict[int, int] = {}
        curves: dict[int, list[tuple[int, float]]] = {}

        def hear(trial: Trial, event: str, figures: dict[str, Any]) -> bool:
            number = trial.labels["number"]
            self.tell(event, trial=trial, **figures)
            if event == "adapter":
                spent[number] = figures["trainable"]
            elif event == "evaluated":
                value = self._value(figures["figures"])
                if value is not None:
                    curves.setdefault(number, []).append((int(figures["step"]), value))
                    return self._hopeless(spent.get(number, 0), *curves[number][-1])
            return False

        for trial, row in self.runner.rows(made.values(), hear):
            number = trial.labels["number"]
            self.run += not row.get("cached", False)
            row.setdefault("trainable", spent.get(number))
            curve = curves.get(number)
            if curve is None:
                curve = [
                    (int(step), value) for step, found in row.get("evaluations") or []
                    if (value := self._value(found)) is not None
                ]  # fmt: skip
            self._ended(running[number], row, curve)

    def _trial(self, one: optuna.Trial) -> Trial:
        """A short run on the half of the held-out rows that decides."""
        length = self._length(self.search.fidelity)
        often = {"evaluate_every": max(1, length["steps"] // (self.search.checks + 1))} if self._prunes() else {}
        quick = {"samples": self._samples(), "save_every": 0, "evaluate_every": None}
        recipe = self.search.recipe(self.space.recipe(one.params), **(quick | length | often))
        return Trial(
            recipe=recipe, half="choosing", groups=self.search.fair, execute=self.metric == EXECUTED,
            labels={"number": one.number},
        )  # fmt: skip

    def _prunes(self) -> bool:
        return self.search.prune_after > 0

    def _samples(self) -> int:
        """Generated answers, where the figure is one of them."""
        return self.search.recipe({}).samples if self.metric in GENERATED else 0

    def _length(self, share: float) -> dict[str, int]:
        """Steps of a run over that of a whole one."""
        recipe = self.search.recipe({})
        steps = recipe.steps
        if steps is None:
            window = recipe.batch_size * recipe.accumulation
            steps = math.ceil(math.ceil(self.rows / window) * (recipe.epochs or 1.0))
        return {"steps": max(1, round(steps * share))}

    def _lower(self) -> bool:
        """Whether less of the figure is better."""
        return less_is_better(self.metric)

    def _value(self, figures: Mapping[str, Any] | None) -> float | None:
        value = (figures or {}).get(self.metric)
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def _hopeless(self, trainable: int, step: int, value: float) -> bool:
        """Whether a trial is worse, at this step, than half of the finished ones that train no more than it.

        Only these speak against it: what costs less may be worse and stand on the Pareto front all the same.
        """
        finished = [one for one in self._known() if one.state == TrialState.COMPLETE]
        if not self._prunes() or len(finished) < self.search.prune_after:
            return False
        others = []
        for one in finished:
            if self.search.cost == "none" or (one.user_attrs.get("trainable") or 0) <= trainable:
                others += [found for at, found in one.user_attrs.get("curve") or [] if at == step]
        if len(others) < 3:
            return False
        middle = statistics.median(others)
        return value > middle if self._lower() else value < middle

    def _ended(self, trial: optuna.Trial, row: Row, curve: list[tuple[int, float]] | None = None) -> None:
        """Remember what became of a trial."""
        status, error = row["status"], row.get("error")
        values: list[float] = []
        if status == "done":
            value = self._value(row.get("figures"))
            if value is None:
                names = ", ".join(row.get("figures") or {}) or "none"
                status, error = "failed", f"there is no figure {self.metric!r}; there are {names}"
            else:
                values = [value]
        if status == "done" and self.search.cost != "none":
            cost = row.get(COSTS[self.search.cost])
            if cost is None:
                status, error = "failed", f"{self.search.cost} is not known on {row.get('device')}; take --cost params"
            else:
                values.append(float(cost))
        trial.set_user_attr("trainable", row.get("trainable"))
        trial.set_user_attr("curve", curve or [])
        trial.set_user_attr("row", row.get("key"))
        if self.search.fair:
            trial.set_user_attr("groups", over_groups(row.get("figures") or {}))
        if error is not None:
            trial.set_user_attr("error", str(error)[:500])
        state = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED}.get(status, TrialState.FAIL)
        self.study.tell(trial, values if state == TrialState.COMPLETE else None, state=state)
        done = sum(one.state.is_finished() for one in self._known())
        self.tell(
            "trial", number=trial.number, status=_STATUS[state], error=error, value=values[0] if values else None,
            cost=values[1] if len(values) > 1 else None, decided=self.space.recipe(trial.params),
            done=done, total=self.search.trials,
        )  # fmt: skip

    # The end

    def _finished(self) -> Found:
        records = [self._record(one) for one in self._known()]
        if not any(one["status"] == "done" for one in records):
            errors = [one["error"] for one in records if one["error"]]
            raise ValueError(
                f"search: none of {len(records)} trials gave a figure; the first said: {(errors or ['nothing'])[0]}"
            )
        best = [
            Best(one.number, dict(one.params), self.space.recipe(one.params), one.values[0],
                 one.values[1] if len(one.values) > 1 else None, int(one.user_attrs["trainable"] or 0))
            for one in self._front()
        ]  # fmt: skip
        found = Found(self.search, self.metric, self._lower(), records, best, self.space.plain(), self._importance())
        self._in_full(found)
        found.run = self.run
        write(found, self._length(1.0), self.folder)
        return found

    def _front(self) -> list[FrozenTrial]:
        """Trials that none beats, the cheapest first, one of those that are alike."""
        unique: dict[tuple[float, ...], FrozenTrial] = {}
        for one in self.study.best_trials:
            if "key" in one.user_attrs:
                unique.setdefault(tuple(one.values), one)
        return sorted(unique.values(), key=lambda one: (one.values[-1], one.values[0]))

    def _importance(self) -> dict[str, float]:
        """How much each choice has to do with a figure among the best quarter (PED-ANOVA, arXiv:2304.10255)."""
        done = [one for one in self._known() if one.state == TrialState.COMPLETE]
        if len(done) < ENOUGH or len({one.values[0] for one in done}) < 2:
            return {}
        sign = 1.0 if self._lower() else -1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is new in Optuna, and says so
            found = optuna.importance.get_param_importances(
                self.study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25),
                target=lambda one: sign * one.values[0],
            )  # fmt: skip
        return {name: float(value) for name, value in found.items()}

    def _record(self, one: FrozenTrial) -> dict[str, Any]:
        attributes = one.user_attrs
        return {
            "number": one.number,
            "status": _STATUS.get(one.state, "running"),
            "error": attributes.get("error"),
            "origin": attributes.get("origin"),
            "configuration": dict(one.params),
            "decided": self.space.recipe(one.params),
            "value": one.values[0] if one.values else None,
            "cost": one.values[1] if one.values and len(one.values) > 1 else None,
            "trainable": attributes.get("trainable"),
            "curve": attributes.get("curve") or [],
            "key": attributes.get("row"),
            "groups": attributes.get("groups") or {},
        }

    def _in_full(self, found: Found) -> None:
        """Run the best at full length, judged by the rows that nothing was chosen by."""
        half: Half = "reporting"
        trials = [
            Trial(
                recipe=self.search.recipe(one.decided, **self._length(1.0), seed=self.search.seed + number),
                half=half, groups=self.search.fair, execute=self.metric == EXECUTED,
                labels={"number": one.number, "best": one},
            )
            for one in found.best for number in range(self.search.full)
        ]  # fmt: skip
        hear: Hear = lambda trial, event, figures: self.tell(event, trial=trial, **figures)  # noqa: E731
        for done, (trial, row) in enumerate(self.runner.rows(trials, hear), 1):
            self.run += not row.get("cached", False)
            trial.labels["best"].full.append(row)
            self.tell("full", done=done, total=len(trials), error=row.get("error"))
        for one in found.best:
            values = [value for row in one.full if (value := self._value(row.get("figures"))) is not None]
            one.full_value = statistics.mean(values) if values else None
        pairs = [(one.value, one.full_value) for one in found.best if one.full_value is not None]
        if len(pairs) >= 3:
            ranks = [rankdata(values) for values in zip(*pairs, strict=True)]
            if all(len(set(one)) > 1 for one in ranks):  # where all are equal there is no order
                found.agreement = float(np.corrcoef(*ranks)[0, 1])


_STATUS = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def _owner() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # a trial of ours that is not running: an earlier search in this process was cut off
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _plain_metric(task: str, labels: Labels | None) -> str:
    """The figure that decides where none is named, as the task has it."""
    if task == "regression":
        return "rmse"
    if labels is None:
        return "loss"
    return "f1" if labels.problem_type == "multi_label_classification" else "accuracy"


def _fair_metric(task: str) -> str:
    """The worst group's figure, as the official code has it: accuracy for classes, else the error or the loss."""
    kinds = {"regression": "rmse", "sequence-classification": "accuracy", "image-classification": "accuracy"}
    return WORST + kinds.get(task, "loss")
