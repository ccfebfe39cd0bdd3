"""Searching: what is proposed, what becomes of trials, what is found, and that it is fair."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

import deltaworks as dw
from deltaworks.cli import main
from deltaworks.study.engine import Runner
from deltaworks.study.fairness import auc, differences, less_is_better, merits, over
from deltaworks.study.pareto import Found
from deltaworks.study.samplers import SparseGPSampler, Valid, copula, make_sampler
from deltaworks.study.search import search
from deltaworks.study.search_spec import Search
from deltaworks.study.space import Choice, Configuration, Space, ladder, make_space
from deltaworks.study.trial import Trial
from deltaworks.training import Recipe, tune
from tests.families import FAMILIES

from .searching import Played, size_of, wanted
from .work import places


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


# What is chosen from


def test_the_documented_file_is_a_search(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "searching.md").read_text(encoding="utf-8")
    (tmp_path / "task.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    entries = Search.read(tmp_path / "task.yaml").entries()
    assert entries[-1] == {"method": "lora", "sizes": [2, 4, 8, 16], "settings": {"on": "attention"}}


@pytest.mark.parametrize("command", ["search", "compare"])
def test_what_is_not_installed_is_said_before_anything_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deltaworks.study.find_spec", lambda name: None if name == "plotly" else name)
    monkeypatch.setattr(Runner, "__init__", lambda *_: pytest.fail("a run was begun"))
    with pytest.raises(SystemExit):
        main([command, "--output", str(tmp_path)])
    said = capsys.readouterr().err
    assert said.strip() == f"deltaworks: {command} needs plotly: pip install 'deltaworks[study]'"


def space_of(family: str, entries: list[dict[str, Any]], **given: Any) -> Space:
    model, _ = FAMILIES[family]()
    return make_space(entries, model.to("meta"), **{"layers": True, "rates": None, "labelled": False} | given)


def test_the_published_space_has_the_published_size() -> None:
    assert ladder(768, "size") == [1, 3, 6, 12, 24, 48, 96, 192, 384, 768]
    assert [768 // one for one in ladder(768, "reduction")][::-1] == ladder(768, "size")
    ten = tuple({"size": value} for value in ladder(768, "size"))
    modules = tuple(Choice(slug, {}, ten) for slug in ("pfeiffer", "parallel_adapter", "prefix_tuning"))
    assert Space(modules, 12).count() == 11**3 * 2**12 == 5_451_776


def test_nothing_is_no_configuration() -> None:
    space = space_of("llama", [{"method": "lora"}, {"method": "ia3"}])
    for found in space.every():
        nothing = not (found["size.lora"] or found["size.ia3"]) or not (found["layer.0"] or found["layer.1"])
        assert space.empty(found) == nothing
        if not nothing:
            recipe = Recipe.of(space.recipe(found))
            assert recipe.method in ("lora", "ia3", "autopeft")


def test_sizes_that_do_not_fit_are_left_out_and_the_others_ordered() -> None:
    space = space_of("llama", [{"method": "pfeiffer"}, {"method": "lora", "sizes": [4, 1]}])
    by_slug = {one.slug: [next(iter(size.values())) for size in one.sizes] for one in space.choices}
    assert by_slug["lora"] == [1, 4]
    assert by_slug["pfeiffer"] == sorted(by_slug["pfeiffer"], reverse=True), "less reduction is more"


def test_pieces_are_masks_over_the_base_and_the_head_always_trains() -> None:
    space = space_of("bert", [{"method": "full", "pieces": ["norm", "attention", "mlp"]}], labelled=True)
    assert space.head is not None
    assert len(space.pieces) == 3 * 2 and space.layers == 0
    model, _ = FAMILIES["bert"]()
    for chosen in ([], ["0.norm"], ["1.attention", "1.mlp"]):
        found = {f"piece.{name}": int(name in chosen) for name in space.pieces}
        recipe = space.recipe(found)
        tuned = dw.attach(model, dw.method(recipe["method"], **recipe["settings"]), also=space.head)
        paths = {name.rpartition(".")[0] for name, _ in tuned.named_parameters()}
        inside = {path for name in chosen for path in space.pieces[name]}
        assert {path for path in paths if ".layer." in path} == inside
        head = space.head.replace("\\", "")
        assert any(path == head or path.startswith(f"{head}.") for path in paths)
        dw.detach(model)


def test_a_configuration_moves_to_another_base() -> None:
    small = Space((Choice("lora", {}, ({"rank": 2}, {"rank": 8})), Choice("ia3", {}, ({},))), 2)
    large = Space((Choice("lora", {}, ({"rank": 1}, {"rank": 4}, {"rank": 7})), Choice("bitfit", {}, ({},))), 4)
    moved = large.moved({"size.lora": 2, "size.ia3": 1, "layer.0": 0, "layer.1": 1}, small.plain())
    assert moved == {"size.lora": 3, "size.bitfit": 0, "layer.0": 0, "layer.1": 0, "layer.2": 1, "layer.3": 1}
    same = {"size.lora": 1, "size.ia3": 0, "layer.0": 1, "layer.1": 0}
    assert small.moved(same, json.loads(json.dumps(small.plain()))) == same


# What is proposed


def test_the_copula_keeps_the_order_and_has_mean_zero() -> None:
    values = np.array([5.0, -100.0, 3.0, 3.0, 1e9])
    through = copula(values)
    assert list(np.argsort(through, kind="stable")) == list(np.argsort(values, kind="stable"))
    assert abs(through.mean()) < 0.05 and through[2] == through[3]


def test_the_sparse_prior_finds_the_variables_that_count() -> None:
    generator = np.random.default_rng(0)
    names = [f"x{number:02d}" for number in range(16)]
    space: dict[str, Any] = {name: optuna.distributions.FloatDistribution(0, 1) for name in names}
    sampler = SparseGPSampler(seed=0, n_startup_trials=2)
    study = optuna.create_study(directions=["minimize"], sampler=sampler)
    for _ in range(60):
        point = generator.random(16)
        value = float(np.sin(5 * point[0]) + 2 * (point[5] - 0.3) ** 2 + point[11] ** 2)
        study.add_trial(
            optuna.trial.create_trial(params=dict(zip(names, point, strict=True)), distributions=space, value=value)
        )
    study.ask(space)
    assert sampler._gprs_cache_list is not None
    lengths = sampler._gprs_cache_list[0].inverse_squared_lengthscales.detach().numpy()
    assert set(np.argsort(lengths)[-3:]) == {0, 5, 11}
    assert np.sort(lengths)[-4] < 0.2 * np.sort(lengths)[-3], "the others hardly count"


def hypervolume(points: list[tuple[float, float]]) -> float:
    """Of points to be minimised, over the unit square."""
    volume, edge = 0.0, 1.0
    for first, second in sorted(points):
        if second < edge and first < 1:
            volume, edge = volume + (1 - first) * (edge - second), second
    return volume


def test_the_model_proposes_better_than_chance() -> None:
    space = Space((Choice("lora", {}, tuple({"rank": 1 << one} for one in range(8))),), 8)

    def outcome(found: Configuration) -> tuple[float, float]:
        layers = sum(found[f"layer.{number}"] for number in range(8))
        gain = 0.1 * found["size.lora"] + (0.6 if found["layer.3"] else 0.0)
        return 1 - min(1.0, gain * 0.7), (found["size.lora"] * layers) / 64

    volumes: dict[str, list[float]] = {"gp": [], "random": []}
    for kind, seed in [("gp", 0), *(("random", seed) for seed in range(5))]:
        study, points, tried = optuna.create_study(directions=("minimize", "minimize")), [], set()
        for number in range(13):
            inner = make_sampler(kind, 100 * seed + number, 10)
            study.sampler = Valid(inner, space, lambda _: True, tried, 100 * seed + number, first=number < 10)
            trial = study.ask(space.distributions)
            tried.add(space.key(trial.params))
            points.append(outcome(trial.params))
            study.tell(trial, points[-1])
        assert len(tried) == 13, "something was tried twice"
        volumes[kind].append(hypervolume(points))
    assert volumes["gp"][0] > np.median(volumes["random"])


def test_when_all_was_tried_it_says_so() -> None:
    space = Space((Choice("lora", {}, ({"rank": 1}, {"rank": 2})),))
    tried = {space.key({"size.lora": 1})}
    valid = Valid(make_sampler("random", 0, 1), space, lambda _: True, tried, 0, first=True)
    assert valid.repaired({"size.lora": 0}) == {"size.lora": 2}
    tried.add(space.key({"size.lora": 2}))
    with pytest.raises(ValueError, match="no configuration is left"):
        valid.repaired({"size.lora": 1})


# What becomes of trials


def test_the_best_are_those_that_none_beats(folder: Path) -> None:
    runner = Played()
    found = search(wanted(folder), runner, folder / "plain")  # type: ignore[arg-type]
    done = [one for one in found.trials if one["status"] == "done"]
    assert len(done) == 8 and found.metric == "loss" and found.lower
    for best in found.best:
        assert not any(one["value"] < best.value and one["cost"] < best.cost for one in done)
    front = {
        (one["value"], one["cost"]) for one in done
        if not any(
            other["value"] <= one["value"] and other["cost"] <= one["cost"]
            and (other["value"], other["cost"]) != (one["value"], one["cost"]) for other in done
        )
    }  # fmt: skip
    assert [(one.value, one.cost) for one in found.best] == sorted(front, key=lambda one: one[1]), "each once"
    assert all(trial.half == "choosing" and trial.recipe.steps == 2 for trial in runner.trials)
    assert [one.cost for one in found.best] == sorted(one.cost or 0 for one in found.best)


@pytest.mark.parametrize("metric", ["passes", "exact_match", "loss"])
def test_what_is_generated_is_run_only_where_that_decides(folder: Path, metric: str) -> None:
    runner = Played(lambda trial: {"figures": {metric: size_of(trial)}})
    found = search(wanted(folder, metric=metric, samples=3, full=1), runner, folder / f"by_{metric}")  # type: ignore[arg-type]
    assert {trial.execute for trial in runner.trials} == {metric == "passes"}
    short = [trial for trial in runner.trials if trial.half == "choosing"]
    assert {trial.recipe.samples for trial in short} == {0 if metric == "loss" else 3}
    assert len(runner.trials) == len(short) + len(found.best)
    assert found.lower == (metric == "loss") and found.best[-1].full_value is not None


def test_a_failed_trial_is_a_failed_trial(folder: Path) -> None:
    def row(trial: Trial) -> dict[str, Any]:
        return {"status": "failed", "error": "no memory"} if "lora" in trial.recipe.text() else {}

    found = search(wanted(folder), Played(row), folder / "failing")  # type: ignore[arg-type]
    failed = [one for one in found.trials if one["status"] == "failed"]
    assert failed and all(one["error"] == "no memory" for one in failed)
    assert found.best and all("lora" not in json.dumps(one.decided) for one in found.best)
    with pytest.raises(ValueError, match="none of 8 trials gave a figure; the first said: broken"):
        search(wanted(folder), Played(lambda _: {"status": "failed", "error": "broken"}), folder / "no")  # type: ignore[arg-type]


def test_a_trial_without_hope_is_stopped_and_a_cheap_one_is_not(folder: Path) -> None:
    # All but the first end at 1; later ones stand far above midway.
    seen: list[float] = []

    def row(trial: Trial) -> dict[str, Any]:
        seen.append(size_of(trial))
        return {"curve": [1.0, 1.0] if len(seen) <= 6 else [9.0, 1.0]}

    runner = Played(row)
    found = search(wanted(folder, trials=14, startup=14, prune_after=6), runner, folder / "pruned")  # type: ignore[arg-type]
    pruned = [one for one in found.trials if one["status"] == "pruned"]
    late = [one for one in found.trials if one["number"] >= 6]
    assert pruned and all(one["curve"][-1][1] == 9.0 for one in pruned)
    early = [one["trainable"] for one in found.trials if one["number"] < 6]
    for one in late:
        cheaper = sum(size <= one["trainable"] for size in early)
        assert one["status"] == "pruned" if cheaper >= 5 else True
        assert one["status"] == "done" if cheaper < 3 and one["number"] < 8 else True
    assert not any(one["number"] in {best.number for best in found.best} for one in pruned)


class Killed(BaseException):
    """Stands for a process's end."""


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    whole = search(wanted(folder), Played(), folder / "whole")  # type: ignore[arg-type]
    left = [5]

    def row(trial: Trial) -> dict[str, Any]:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return {}

    with pytest.raises(Killed):
        search(wanted(folder), Played(row), folder / "cut")  # type: ignore[arg-type]
    again = Played()
    found = search(wanted(folder), again, folder / "cut")  # type: ignore[arg-type]
    assert len(again.trials) == 3
    alike = ("number", "status", "configuration", "value", "cost", "origin")
    assert [{key: one[key] for key in alike} for one in found.trials] == [
        {key: one[key] for key in alike} for one in whole.trials
    ]
    more = Played()
    assert len(search(wanted(folder, trials=10), more, folder / "cut").trials) == 10  # type: ignore[arg-type]
    assert len(more.trials) == 2
    with pytest.raises(ValueError, match="holds a search with fidelity=0.5, this one has 0.25"):
        search(wanted(folder, fidelity=0.25), Played(), folder / "cut")  # type: ignore[arg-type]


def test_a_found_set_is_tried_first_on_another_task(folder: Path) -> None:
    first = search(wanted(folder), Played(), folder / "first")  # type: ignore[arg-type]
    runner = Played()
    other = wanted(folder, base=places(folder)["base"], limit=12, trials=len(first.best) + 2)
    found = search(other, runner, folder / "second", start_from=folder / "first")  # type: ignore[arg-type]
    taken = [one for one in found.trials if one["origin"] == "transfer"]
    assert [one["configuration"] for one in taken] == [one.configuration for one in first.best]
    assert [one["number"] for one in taken] == list(range(len(first.best)))
    with pytest.raises(ValueError, match="no finished search is there"):
        search(other, Played(), folder / "third", start_from=folder)  # type: ignore[arg-type]


def test_nothing_is_larger_than_allowed(folder: Path) -> None:
    runner = Played()
    found = search(wanted(folder, most="600", trials=4), runner, folder / "bounded")  # type: ignore[arg-type]
    model, _ = FAMILIES["llama"]()
    for one in found.trials:
        tuned = dw.attach(model, dw.method(one["decided"]["method"], **one["decided"]["settings"]))
        assert tuned.summary().trainable <= 600
        dw.detach(model)


# For real


@pytest.fixture(scope="module")
def real(folder: Path) -> Found:
    with Runner(folder / "cache", jobs=2, threads=1) as runner:
        return search(wanted(folder, trials=3, startup=3, full=1), runner, folder / "real")


def test_the_best_are_recipes_that_tune_runs(folder: Path, real: Found) -> None:
    assert [one["status"] for one in real.trials] == ["done"] * 3
    files = sorted((folder / "real" / "pareto").glob("*.yaml"))
    assert [one.path for one in real.best] == files
    result = tune(Recipe.read(files[0], output=str(folder / "tuned")))
    assert result.metrics["steps"] == 4
    assert result.metrics["adapter"]["trainable"] == real.best[0].trainable
    assert dw.adapters.inspect(result.adapter)["values"] == real.best[0].cost
    assert real.best[0].full_value is not None and real.best[0].full[0]["steps"] == 4
    again = json.loads((folder / "real" / "results.json").read_text())
    assert [one["number"] for one in again["trials"]] == [0, 1, 2]


def test_the_command_goes_on_and_says_what_it_found(folder: Path, real: Found, capsys: pytest.CaptureFixture) -> None:
    given = folder / "given.yaml"
    given.write_text((folder / "real" / "search.yaml").read_text())
    with pytest.raises(SystemExit) as ended:
        main(["search", str(given), "--output", str(folder / "real"), "--cache", str(folder / "cache"), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["run"] == 0 and told["done"] == 3
    assert [one["value"] for one in told["best"]] == [one.value for one in real.best]


def test_a_found_set_moves_to_another_task_by_the_command(folder: Path, real: Found, capsys: Any) -> None:
    from tests.training.conftest import prepared_data

    given = folder / "classes.yaml"
    keys = wanted(folder, data=prepared_data(folder, "classes"), trials=len(real.best) + 1).as_dict()
    given.write_text(json.dumps(keys))
    with pytest.raises(SystemExit) as ended:
        main(["search", str(given), "--start-from", str(folder / "real"), "--output", str(folder / "moved"),
              "--cache", str(folder / "cache"), "--json"])  # fmt: skip
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["metric"], told["done"], told["run"]) == ("accuracy", len(real.best) + 1, len(real.best) + 1)
    trials = json.loads((folder / "moved" / "results.json").read_text())["trials"]
    moved = [one for one in trials if one["origin"] == "transfer"]
    assert [one["configuration"] for one in moved] == [one.configuration for one in real.best]
    assert all(one["status"] == "done" and one["value"] is not None for one in moved)
    assert "from another search" in (folder / "moved" / "report.html").read_text()


KILLED = """
import os, signal, sys, yaml
from pathlib import Path
from deltaworks.study.engine import Runner
from deltaworks.study.search import search
from deltaworks.study.search_spec import Search

def tell(event, **figures):
    if event == "step" and figures["trial"].labels["number"] == 2 and figures["step"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    wanted = Search.read(folder / "search.yaml")
    with Runner(folder / "cache", jobs=1, threads=1) as runner:
        search(wanted, runner, folder / "out", tell=tell)
"""


def test_a_search_that_got_sigkill_within_a_trial_loses_none_and_runs_none_twice(tmp_path: Path) -> None:
    # So long that the trial that is cut off cannot end before its search does.
    given = wanted(tmp_path, trials=4, startup=4, steps=400)
    (tmp_path / "search.yaml").write_text(json.dumps(given.as_dict()))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    ended = subprocess.run([sys.executable, script, tmp_path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL

    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'out' / 'search.db'}")
    left = study.get_trials()
    assert [one.state.name for one in left] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert len(list((tmp_path / "cache").glob("*/row.json"))) == 2, "nothing is known of what was cut off"
    assert not list((tmp_path / "out").glob("*.json"))

    begun: list[int] = []

    def tell(event: str, **figures: Any) -> None:
        if event == "adapter":
            begun.append(figures["trial"].labels["number"])

    with Runner(tmp_path / "cache", jobs=1, threads=1) as runner:
        found = search(given, runner, tmp_path / "out", tell=tell)
        whole = search(given, runner, tmp_path / "whole")
    assert begun == [2, 3] and found.run == 2
    assert [one["number"] for one in found.trials] == [0, 1, 2, 3]
    assert [one["status"] for one in found.trials] == ["done"] * 4
    assert len({json.dumps(one["configuration"]) for one in found.trials}) == 4
    assert [one["value"] for one in found.trials[:2]] == [one.values[0] for one in left[:2]]
    assert found.trials[2]["configuration"] == left[2].params
    assert whole.run == 0 and whole.trials == found.trials, "as if it had not been killed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "loraa"], "did you mean lora"),
        (["--rates", "1e-3"], "--rates 1e-3 is not understood"),
        (["--most", "many"], "is not an amount"),
        (["--sampler", "magic"], "one of gp, tpe, random"),
        (["--data", "nursery:nothing"], "nothing"),
        (["--methods", "autopeft"], "name the methods that it may hold"),
        (["--lr", "1e-3", "--rates", "1e-4,1e-2"], "both given"),
        (["--storage", "nosql:///x"], "cannot be opened"),
        (["--fair", "age"], "no column 'age'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    common = ["--base", places(folder)["base"], "--steps", "2", "--trials", "2", "--output", str(folder / "wrong")]
    with pytest.raises(SystemExit) as ended:
        main(["search", "--data", places(folder)["data"], *common, "--cache", str(folder / "cache"), *options])
    assert ended.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("deltaworks: ")


# Fairness


def test_figures_over_groups_are_those_counted_by_hand() -> None:
    chances = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8], [0.8, 0.2], [0.4, 0.6]], dtype=torch.double)
    old, young = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 0, 1])
    assert merits(chances, old)["accuracy"] == pytest.approx(4 / 6)
    # Chances of class 1 are .4 .8 .6 inside and .1 .7 .2 outside: .4 above two, .8 above three, .6 above two.
    assert auc(chances, old) == pytest.approx(7 / 9)
    assert merits(chances, young)["accuracy"] == auc(chances, young) == 1
    found = over({"old": merits(chances, old), "young": merits(chances, young)})
    assert found["worst_accuracy"] == pytest.approx(4 / 6) and found["gap_accuracy"] == pytest.approx(2 / 6)
    assert found["worst_loss"] == max(found["group.old.loss"], found["group.young.loss"])
    apart = differences([(chances, old), (chances[:4], young[:4])])
    assert apart["demographic_parity"] == pytest.approx(0.0)
    assert apart["equalised_odds"] == pytest.approx(1 / 3)
    assert np.isnan(auc(chances, torch.zeros(6, dtype=torch.long)))
    assert "group.x.auc" not in over({"x": merits(chances, torch.zeros(6, dtype=torch.long))})
    assert less_is_better("gap_auc") and less_is_better("worst_loss") and not less_is_better("worst_accuracy")


def test_the_fairer_of_two_is_chosen(folder: Path) -> None:
    """The label is the first word for two rows of three, the opposite for the others: those are group b.

    What trains the head alone does what is right for the majority; what trains the base learns both.
    """
    chance = random.Random(0)
    rows = []
    for index in range(120):
        group, first = ("b" if index % 3 == 0 else "a"), chance.choice(["w1", "w2"])
        label = (first == "w1") != (group == "b")
        mark = "w9" if group == "b" else "w8"
        rows.append({"text": f"{first} {mark}", "label": ["no", "yes"][label], "who": group})
    data = folder / "groups.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from tests.training.conftest import prepared_base

    keys = {
        "base": prepared_base(folder, "bert"), "data": str(data), "fair": "who", "trials": 4, "startup": 4, "seed": 0,
        "methods": [{"method": "full", "pieces": ["block"]}], "fidelity": 1.0, "full": 1, "steps": 50, "lr": 5e-3,
        "batch_size": 16, "cost": "none", "prune_after": 0, "device": "cpu", "validation": 0.3,
    }  # fmt: skip
    with Runner(folder / "cache", jobs=2, threads=1) as runner:
        found = search(Search.of(keys), runner, folder / "fair")
    assert found.metric == "worst_accuracy" and not found.lower
    assert len(found.best) == 1
    by_mask = {sum(one["configuration"].values()): one["value"] for one in found.trials}
    assert set(by_mask) == {0, 1, 2}, "every mask was tried"
    assert by_mask[0] < 0.7 and by_mask[2] > 0.9
    assert found.best[0].value == max(one["value"] for one in found.trials)
    assert sum(found.best[0].configuration.values()) > 0
    figures = found.best[0].full[0]["figures"]
    assert figures["worst_accuracy"] == min(figures["group.a.accuracy"], figures["group.b.accuracy"])
    assert figures["group.a.rows"] + figures["group.b.rows"] == 18
