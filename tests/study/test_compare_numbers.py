"""Figures of a comparison, against figures computed by hand."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from deltaworks.core.registry import methods
from deltaworks.model.loading import load_base
from deltaworks.study import scores, sizes
from deltaworks.study.flops import Flops
from deltaworks.study.rates import Rates
from deltaworks.study.statistics import bootstrap, pareto, win_rate, win_rates
from deltaworks.study.summary import is_full, sentences, short
from tests.training.conftest import prepared_base


def test_the_interval_of_few_runs_is_that_of_all_resamples() -> None:
    found = bootstrap([1.0, 2.0, 6.0])
    means = sorted(sum(some) / 3 for some in itertools.product([1.0, 2.0, 6.0], repeat=3))
    assert found.mean == 3.0 and found.count == 3
    # The 27 means; the 2.5 % quantile lies at place 0.65 between the first (1) and the second (4/3).
    assert means[:2] == pytest.approx([1, 4 / 3]) and found.low == pytest.approx(1 + 0.65 / 3)
    # From above, between the greatest (6) and the next (14/3).
    assert found.high == pytest.approx(6 - 0.65 * (6 - 14 / 3))
    assert str(bootstrap([2.5])) == "2.5" and bootstrap([2.5]).low == bootstrap([2.5]).high == 2.5
    with pytest.raises(ValueError, match="nothing"):
        bootstrap([])


def test_the_interval_of_many_runs_covers_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    intervals = [bootstrap(draw.normal(3, 1, 30).tolist()) for _ in range(60)]
    covered = sum(one.low <= 3 <= one.high for one in intervals)
    assert 50 <= covered <= 60
    assert bootstrap([1.0] * 20).low == 1.0
    assert bootstrap(list(range(20))) == bootstrap(list(range(20)))


def test_win_rates_count_paired_runs_only() -> None:
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0}, {0: 2.0, 1: 2.0, 2: 1.0, 4: 0.0}
    assert win_rate(ours, theirs, lower=True) == (1 + 0.5 + 0) / 3
    assert win_rate(ours, theirs, lower=False) == (0 + 0.5 + 1) / 3
    assert win_rate(ours, {7: 1.0}, lower=True) is None
    rates = win_rates({"a": ours, "b": theirs, "c": {9: 1.0}}, lower=True)
    assert rates == {"a": {"b": 0.5}, "b": {"a": 0.5}, "c": {}}


def test_the_front_holds_what_none_beats_in_both() -> None:
    points = {"small": (1.0, 5.0), "worse": (2.0, 6.0), "large": (3.0, 2.0), "as good": (4.0, 2.0)}
    assert pareto(points, lower=True) == ["small", "large"]
    assert pareto(points, lower=False) == ["small", "worse"]


def climbed(cost: Any, start: float, tries: int) -> tuple[float | None, list[float]]:
    search, asked = Rates(start, tries), []
    while (rate := search.ask()) is not None:
        asked.append(rate)
        search.tell(rate, cost(rate))
    return search.best(), asked


def test_rates_climb_from_far_below_the_best() -> None:
    best, asked = climbed(lambda rate: abs(math.log10(rate / 1e-2)), 1e-5, 6)
    assert best == pytest.approx(1e-2) and len(asked) == 6 and asked[0] == 1e-5
    best, asked = climbed(lambda rate: abs(math.log10(rate / 3.3e-3)), 1e-3, 5)
    assert best == pytest.approx(3.16e-3) and len(set(asked)) == 5


def test_rates_come_down_from_where_nothing_works() -> None:
    best, asked = climbed(lambda rate: None if rate > 1e-2 else -rate, 1.0, 4)
    assert asked[:3] == [1.0, 0.1, 0.01] and best == pytest.approx(0.01)
    assert climbed(lambda rate: None, 1.0, 2)[0] is None


def test_given_rates_are_all_tried() -> None:
    search = Rates(1e-3, 5, [1.0, 2.0])
    for cost in (3.0, float("nan")):
        rate = search.ask()
        assert rate is not None
        search.tell(rate, cost)
    assert search.ask() is None and search.best() == 1.0


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from deltaworks.model.loading import load_meta

    return load_meta(prepared_base(tmp_path_factory.mktemp("base"), "llama"))


@pytest.mark.parametrize("slug", ["lora", "dora", "vera", "adalora", "houlsby", "prefix_tuning", "fourierft", "lokr"])
def test_sizes_come_to_a_budget_of_trained_values(slug: str, shape: Any) -> None:
    measure = sizes.on_shape(shape, slug, "trainable")
    fit = sizes.fitted(slug, {}, 6000, measure)
    assert fit.reached is not None and fit.reached == measure(fit.settings)
    name = sizes.size_names(slug)[0]
    for step in (-1, 1):
        beside = {**fit.settings, name: fit.settings[name] + step}
        if len(sizes.size_names(slug)) == 1 and beside[name] > 0 and (other := measure(beside)) is not None:
            assert abs(other - 6000) >= abs(fit.reached - 6000), "a size beside it comes nearer"


def test_linked_sizes_keep_their_ratio(shape: Any) -> None:
    fit = sizes.fitted("adalora", {}, 20000, sizes.on_shape(shape, "adalora", "trainable"))
    assert fit.settings["init_rank"] / fit.settings["target_rank"] == pytest.approx(12 / 8, rel=0.2)


def test_a_budget_that_must_not_be_passed_is_not(shape: Any) -> None:
    measure = sizes.on_shape(shape, "lora", "saved_bytes")
    fit = sizes.fitted("lora", {}, 30000, measure, above=False)
    assert fit.reached is not None and fit.reached <= 30000 < measure({"rank": fit.settings["rank"] + 1})
    least = sizes.fitted("lora", {}, 10, measure, above=False)
    assert least.settings["rank"] == 1 and "least" in least.note
    assert sizes.fitted("ia3", {}, 10, sizes.on_shape(shape, "ia3", "trainable")).note == "its size is fixed"


def test_a_size_that_makes_smaller_is_understood() -> None:
    fit = sizes.fitted("lst", {}, 250, lambda settings: 4000 / settings["reduction"])
    assert fit.settings["reduction"] == 16 and fit.reached == 250


def test_values_that_cannot_be_are_passed_over() -> None:
    fit = sizes.fitted("lora", {}, 700, lambda settings: None if settings["rank"] % 2 else 100 * settings["rank"])
    assert fit.settings["rank"] in (6, 8)


def test_every_method_has_a_size_or_a_fixed_one() -> None:
    for slug, cls in methods().items():
        for name in sizes.size_names(slug):
            assert isinstance(getattr(cls, name), int)


def test_flops_of_a_product_are_twice_its_multiplications(tmp_path: Any) -> None:
    import torch

    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    with Flops() as flops:
        out = a @ b
        forward = flops.total
        out.sum().backward()
    assert forward == 2 * 3 * 5 * 7 and flops.total == 3 * forward


def test_counting_does_not_change_a_step(tmp_path: Any) -> None:
    import torch

    import deltaworks as dw

    losses = []
    for counted in (False, True):
        model = load_base(prepared_base(tmp_path, "llama"))
        dw.attach(model, dw.LoRA(rank=2), seed=0)
        ids = torch.arange(5, 25).view(2, 10)
        with Flops() if counted else torch.enable_grad():
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        losses.append((loss.item(), sum(float(p.grad.sum()) for p in model.parameters() if p.grad is not None)))
    assert losses[0] == losses[1]


def test_scores_of_texts() -> None:
    assert scores.exact_match(" a b ", "a b") == 1 and scores.exact_match("a", "b") == 0
    assert scores.similarity("abcd", "abcd") == 1 and scores.similarity("abcd", "bcde") == 0.75
    assert scores.chrf("abc", "abc") == 1 and scores.chrf("abc", "xyz") == 0
    # n = 1: 2 of 3 and 2 of 2; n = 2: 1 of 2 and 1 of 1; n = 3: the shorter has none. F with beta 2.
    precision, recall = (1 + 1) / 2, (2 / 3 + 1 / 2) / 2
    assert scores.chrf("abc", "ab") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert scores.parses("def f():\n    ", "return 1") == 1 and scores.parses("def f(:", "retrn 1 1") == 0
    assert scores.scores([]) == {}


def test_numbers_for_people() -> None:
    assert [short(value) for value in (None, 215040, 3.2e9, 0)] == ["-", "215 k", "3.2 G", "0"]
    assert [short(value, "bytes") for value in (640, 2048, 3 << 30)] == ["640 B", "2 KiB", "3 GiB"]
    assert [short(value, "s") for value in (0.0479, 2)] == ["47.9 ms", "2 s"]


def test_tuning_a_part_in_full_is_not_full_fine_tuning():
    def method(name, mean, on):
        settings = json.dumps({"on": on} if on else {})
        return {
            "name": name, "slug": "full", "kind": "tune", "mean": mean, "low": mean, "high": mean, "runs": 1,
            "failed": 0, "settings": settings, "forgetting": None, "trainable": 10,
        }  # fmt: skip

    lora = method("lora", 0.9, None) | {"slug": "lora"}
    parts = [method("embeddings", 0.8, "embedding"), method("all of it", 0.7, "everything")]
    cell = {"metric": "accuracy", "methods": [lora, *parts], "fronts": {"trainable": ["lora"]}}
    said = sentences(cell)
    assert "Full fine-tuning: 0.7." in said
    assert [is_full(one) for one in cell["methods"]] == [False, False, True]
