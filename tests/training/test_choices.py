"""Choosing between texts: T-Few's losses, what is chosen, and a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from deltaworks.data import BadRow, load, prepare
from deltaworks.study.trial import Trial
from deltaworks.study.work import perform
from deltaworks.training import Recipe, tune
from deltaworks.training.choices import Choices
from deltaworks.training.evaluation import batches
from deltaworks.training.tune import open_run
from tests.data.tokenizers_from_nothing import byte_level
from tests.training.conftest import prepared_base


def question(index: int) -> dict[str, Any]:
    """What belongs to a word, among two that do not; the right place changes."""
    kind, place = index % 4, index % 3
    choices = [f"w{10 + (kind + 1) % 4}", "w30 w31"]
    choices.insert(place, f"w{10 + kind}")
    return {"prompt": f"w{20 + index % 7} w{kind}", "choices": choices, "answer": place}


ROWS = [question(index) for index in range(40)]


def batch(*questions: tuple[list[list[float]], int]) -> Choices:
    """Questions of choices, each a list of its tokens' negative log-likelihoods, with the place of the right one."""
    texts = [text for question, _ in questions for text in question]
    return Choices(
        ce=torch.tensor([value for text in texts for value in text]),
        sequence=torch.tensor([index for index, text in enumerate(texts) for _ in text]),
        question=torch.tensor([index for index, (question, _) in enumerate(questions) for _ in question]),
        right=torch.tensor([place == right for question, right in questions for place in range(len(question))]),
    )


TWO = batch(([[1.0, 3.0], [0.5, 0.5, 0.8], [4.0]], 1), ([[2.0], [1.0, 2.0]], 0))


def test_the_likelihood_is_a_mean_over_tokens_not_over_questions() -> None:
    assert TWO.likelihood() == pytest.approx((0.5 + 0.5 + 0.8 + 2.0) / 4)


def test_the_length_normalised_loss_compares_means_within_a_question() -> None:
    first = -math.log(math.exp(-0.6) / (math.exp(-2) + math.exp(-0.6) + math.exp(-4)))
    second = -math.log(math.exp(-2) / (math.exp(-2) + math.exp(-1.5)))
    assert float(TWO.length_normalised()) == pytest.approx((first + second) / 2)
    assert TWO.chosen().tolist() == [1, 1] and TWO.answers().tolist() == [1, 0]


def test_the_unlikelihood_is_a_mean_over_the_tokens_of_wrong_choices() -> None:
    wrong = [1.0, 3.0, 4.0, 1.0, 2.0]
    assert float(TWO.unlikelihood()) == pytest.approx(sum(-math.log(1.01 - math.exp(-v)) for v in wrong) / 5)
    surer = batch(([[9.0, 9.0], [0.5, 0.5, 0.8], [9.0]], 1), ([[2.0], [9.0, 9.0]], 0))
    assert surer.unlikelihood() < TWO.unlikelihood()
    certain = batch(([[1.0], [0.0]], 0))
    assert float(certain.unlikelihood()) == pytest.approx(-math.log(0.01)), "finite where a wrong token is certain"


def test_a_single_choice_leaves_the_likelihood_alone() -> None:
    lone = batch(([[1.0, 2.0]], 0), ([[4.0]], 0))
    assert (float(lone.length_normalised()), float(lone.unlikelihood())) == (0.0, 0.0)
    assert float(lone.loss()) == float(lone.loss("lm")) == pytest.approx(7 / 3)


def test_repeating_equally_likely_tokens_changes_no_score_but_with_power_0() -> None:
    short, long = batch(([[1.0], [2.0, 2.0]], 0)), batch(([[1.0], [2.0] * 5], 0))
    assert torch.equal(short.scores(), long.scores())
    assert long.scores(power=0)[1] == 10 > short.scores(power=0)[1]
    assert batch(([[1.5], [1.0, 1.0]], 0)).chosen().tolist() == [1]
    assert batch(([[1.5], [1.0, 1.0]], 0)).chosen(power=0).tolist() == [0]


def test_all_three_terms_are_learned_from() -> None:
    ce = TWO.ce.clone().requires_grad_()
    Choices(ce, TWO.sequence, TWO.question, TWO.right).loss().backward()
    assert float(TWO.loss()) == pytest.approx(float(TWO.likelihood() + TWO.length_normalised() + TWO.unlikelihood()))
    assert ce.grad is not None and bool((ce.grad[TWO.right[TWO.sequence]] > 0).all())
    assert bool((ce.grad[~TWO.right[TWO.sequence]] < 0).all()), "wrong choices become less likely"


def collated(rows: list[dict[str, Any]], **keys: Any) -> dict[str, Tensor]:
    prepared = prepare(load(rows, validation=None), "multiple-choice", byte_level(), **keys)
    assert prepared.collator is not None
    return prepared.collator(list(prepared.train))


def test_padding_changes_nothing() -> None:
    rows = [ROWS[0], {"prompt": "x" * 30, "choices": ["yes", "no"], "answer": "no"}]
    both, padded = collated(rows), collated(rows, pad_to_multiple_of=64)
    assert both["question"].tolist() == [0, 0, 0, 1, 1] and both["right"].tolist() == [True, False, False, False, True]
    vocabulary = int(both["input_ids"].max()) + 1
    logits = torch.randn(5, padded["labels"].shape[1], vocabulary, generator=torch.Generator().manual_seed(0))
    one, other = (
        Choices.of(logits[:, : found["labels"].shape[1]], found["labels"], found["question"], found["right"])
        for found in (both, padded)
    )
    assert torch.equal(one.ce, other.ce) and one.loss() == other.loss()
    labels = both["labels"][4, 1:]
    places = (labels != -100).nonzero().flatten()
    likelihood = log_softmax(logits[4], -1)[places, labels[places]].mean()
    assert float(one.scores()[4]) == pytest.approx(-float(likelihood), rel=1e-5)
    tokenizer = byte_level()
    texts = [
        tokenizer.decode([t for t in row.tolist() if t != -100], skip_special_tokens=True) for row in both["labels"]
    ]
    assert texts == [*ROWS[0]["choices"], "yes", "no"], "prompts are not learned"


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, r"answer is 2; a place in 0..1 or the text of a choice"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, r"answer is 'd'; a place in 0..1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, r"answer is True; a place in 0..1"),
        ({"prompt": "a", "choices": ["b", "b"], "answer": 0}, r"choices has 'b' more than once"),
        ({"prompt": "a", "choices": ["b", 3], "answer": 0}, r"choices\[1\] is 3, a int; a text is needed"),
        ({"prompt": "a", "choices": [], "answer": 0}, r"choices is an empty list"),
        ({"prompt": "a", "choices": "b", "answer": 0}, r"choices is 'b'; a list is needed"),
    ],
)
def test_a_bad_row_says_what_would_be_right(row: dict[str, Any], wrong: str) -> None:
    with pytest.raises(BadRow, match=wrong) as caught:
        load([ROWS[0], row], validation=None, format="prompt-choices")
    assert str(caught.value).startswith("row 2: ") and "\n" not in str(caught.value)
    kept = load([ROWS[0], row], validation=None, format="prompt-choices", on_bad_row="skip")
    assert len(kept.train) == 1 and len(kept.skipped) == 1


def test_answers_may_be_texts_and_csv_holds_lists_as_json(tmp_path: Path) -> None:
    file = tmp_path / "questions.csv"
    file.write_text('question,options,label\nwhich?,"[""a"", ""b""]",1\nwhich?,"[""a"", ""b""]",a\n')
    assert load(file, validation=None).train["answer"][:] == [1, 0]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("choices")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    base = prepared_base(folder, "llama")
    return {"base": base, "data": str(data), "device": "cpu", "validation": 0.2, "batch_size": 4, "samples": 0}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_learns_to_choose(places: dict[str, Any], tmp_path: Path, accumulation: int) -> None:
    recipe = Recipe.of(
        places,
        {"method": "lora", "lr": 1e-2, "steps": 25, "output": str(tmp_path / "run"), "accumulation": accumulation},
    )
    result = tune(recipe)
    assert result.metrics["task"] == "multiple-choice"
    assert result.before is not None and result.after is not None
    assert set(result.after) == {"loss", "accuracy"}
    assert result.after["loss"] < result.before["loss"] and result.after["accuracy"] > result.before["accuracy"]


def test_the_size_of_the_window_does_not_scale_the_loss(places: dict[str, Any], tmp_path: Path) -> None:
    quiet = {"method": "lora", "lr": 1e-9, "steps": 1}
    losses = {}
    for accumulation, size in ((1, 24), (4, 6)):
        keys = {"accumulation": accumulation, "batch_size": size, "output": str(tmp_path / str(size))}
        losses[size] = tune(Recipe.of(places, quiet, keys)).metrics["losses"][0][1]
    assert losses[24] == pytest.approx(losses[6], rel=0.05), "the mean over four parts, up to their tokens"


def test_half_precision_on_a_cpu_meets_few_lengths(places: dict[str, Any], tmp_path: Path) -> None:
    """For every length of a batch such products are compiled anew, and kept."""
    file = tmp_path / "long.jsonl"
    rows = [question(index) | {"prompt": " ".join(["w1"] * (1 + index))} for index in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = {}
    for dtype in ("float32", "bfloat16"):
        opened = open_run(Recipe.of(places, {"data": str(file), "dtype": dtype, "output": str(tmp_path / dtype)}))
        made = batches(opened.prepared.train, opened.prepared.collator, 1, "cpu")
        lengths[dtype] = {batch["input_ids"].shape[1] for batch in made}
    assert len(lengths["float32"]) > 20
    assert len(lengths["bfloat16"]) == 2 and max(lengths["bfloat16"]) == max(lengths["float32"])


def test_the_plain_loss_is_another_one(places: dict[str, Any], tmp_path: Path) -> None:
    ours = {"method": "ia3", "lr": 1e-3, "steps": 2}
    few = tune(Recipe.of(places, ours, {"output": str(tmp_path / "few")})).metrics["losses"]
    plain = tune(Recipe.of(places, ours, {"output": str(tmp_path / "lm"), "choice_loss": "lm"})).metrics["losses"]
    assert few[0][1] > plain[0][1] + 0.5, "two terms more"
    with pytest.raises(ValueError, match="choice_loss='hinge' is not allowed; it must be one of t-few, lm"):
        Recipe.of({"choice_loss": "hinge"})


def test_examples_in_the_prompt_cost_operations_and_stand_before_every_choice(
    places: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe.of(places, {"method": "lora"})
    base, context = (
        perform(Trial(recipe=recipe, kind=kind, context=2), tmp_path / kind)  # type: ignore[arg-type]
        for kind in ("base", "context")
    )
    assert context["task"] == "multiple-choice" and set(context["figures"]) == {"loss", "accuracy"}
    assert context["example_flops"] > 1.5 * base["example_flops"]
