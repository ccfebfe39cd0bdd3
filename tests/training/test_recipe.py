"""Recipes: keys are options, options win, what is unknown is refused with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import deltaworks as dw
from deltaworks.training import Recipe


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: lora\nsettings: {rank: 4, on: attention}\nsteps: 10\nbatch-size: 2\nlr: 1e-4\n")
    recipe = Recipe.read(file, settings={"rank": 16}, epochs=2)
    assert recipe.settings == {"rank": 16, "on": "attention"}
    assert (recipe.steps, recipe.epochs, recipe.batch_size, recipe.lr) == (None, 2, 2, 1e-4)
    assert Recipe.read(file, method="bitfit", settings={}).settings == {}


def test_a_complete_recipe_is_written_and_read_back(tmp_path: Path) -> None:
    recipe = Recipe.of({"method": "lora", "settings": {"on": "attention"}, "columns": {"prompt": "q"}}).complete()
    assert recipe.lr == 1e-3 and recipe.epochs == 1 and recipe.output == "runs/nursery-decoder-lora"
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.text())
    assert Recipe.read(file) == recipe


def test_typed_settings_become_values_and_the_bare_key_on_stays_a_word(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("settings: {on: mlp, rank: 4}\n")  # YAML 1.1 reads this key as true
    assert Recipe.read(file, settings={"rank": "16"}).complete().settings == {"on": "mlp", "rank": 16}
    terms = Recipe.of({"method": "glora", "settings": {"a": "vector", "b": "none"}}).settings
    assert terms == {"a": "vector", "b": "none"}, "where `none` is a word for something, it stays one"
    assert Recipe.of({"method": "switchlora", "settings": {"rank": "none"}}).settings["rank"] is None


def test_the_learning_rate_is_the_methods_own() -> None:
    from deltaworks import methods

    assert Recipe(method="full").complete().lr == methods()["full"].default_lr != 1e-3
    assert Recipe(method="full", lr=3e-4).complete().lr == 3e-4


def test_the_learning_rate_is_that_of_the_methods_settings() -> None:
    for slug, settings, rate in (
        ("svft", {}, 5e-2),
        ("svft", {"pattern": "banded"}, 5e-3),
        ("capaboost", {}, 5e-4),
        ("capaboost", {"over": "svft"}, 5e-2),
        ("lora_plus", {}, 5e-4),
        ("lora_plus", {"over": "qlora"}, 1e-4),
        ("mezo", {}, 1e-6),
        ("mezo", {"over": "lora"}, 5e-5),
        ("mezo", {"over": "dora"}, 5e-5),
        ("mezo", {"over": "prefix-tuning"}, 1e-3),
    ):
        assert Recipe(method=slug, settings=settings).complete().lr == rate


def test_a_recipe_holds_the_slug_of_a_method_that_was_given_itself() -> None:
    one = Recipe(method="lora_plus", settings={"over": dw.DoRA(rank=4)})
    assert one.settings == {"over": "dora", "inner": {"rank": 4}}
    assert yaml.safe_load(one.text())["settings"] == one.settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bach-size": 3}, "recipe has no key 'bach-size'; did you mean batch_size?"),
        ({"zzz": 3}, "recipe has no key 'zzz'; there are base, data, task"),
        ({"batch_size": 0}, "batch_size=0 is not allowed; it must be a whole number of at least 1"),
        ({"batch_size": "many"}, "batch_size='many' is not allowed"),
        ({"method": "lorra"}, "there is no method 'lorra'; did you mean lora"),
        ({"settings": {"rnk": 3}}, "lora has no hyper-parameter 'rnk'"),
        ({"settings": 3}, "settings=3 is not allowed; it must be a mapping"),
        ({"steps": 3, "epochs": 2.0}, "steps=3 and epochs=2 are both given; give one"),
        ({"validation": 1.5}, "validation=1.5 is not allowed; it must be a share"),
        ({"task": "chess"}, "task='chess' is not allowed; it must be one of causal-lm"),
        ({"lr": float("nan")}, "lr=nan is not allowed"),
        ({"quantize": "int2"}, "quantize='int2' is not allowed; it must be one of int8"),
        ({"also": []}, "also=[] is not allowed"),
    ],
)
def test_an_impossible_recipe_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.of(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: [", "is not YAML"),
        ("- base", "is not a recipe: a mapping of keys"),
        ("1: 2", "is not a recipe: a mapping of keys"),
        ("!!python/object/apply:os.system ['false']", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.read(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is a folder"):
        Recipe.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        Recipe.read(tmp_path / "none.yaml")


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_that_come_along_can_be_read(file: Path) -> None:
    recipe = Recipe.read(file)
    assert recipe.complete().lr is not None


def test_every_optimizer_is_one_of_the_trainers() -> None:
    from transformers.training_args import OptimizerNames

    from deltaworks.training.recipe import OPTIMIZERS
    from deltaworks.training.tune import OPTIMIZERS as NAMES

    assert set(OPTIMIZERS) == set(NAMES) and all(OptimizerNames(name) for name in NAMES.values())
