"""`tune`: every task, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaworks as dw
from deltaworks.data import load, prepare
from deltaworks.model.loading import load_base
from deltaworks.training import Recipe, Result, tune
from deltaworks.training.evaluation import held_out

from .conftest import WORDS

Folder = Callable[[str], str]
TASKS = {  # task: family of the base, data, figures beside the loss
    "causal-lm": ("llama", "completions", {"perplexity"}),
    "seq2seq": ("t5", "pairs", {"perplexity"}),
    "masked-lm": ("bert", "texts", {"perplexity"}),
    "sequence-classification": ("bert", "classes", {"accuracy", "auc", "f1"}),
    "regression": ("bert", "numbers", {"mae", "rmse", "pearson"}),
    "token-classification": ("bert", "tags", {"accuracy", "f1", "span_f1"}),
    "image-classification": ("vit", "images", {"accuracy", "auc", "f1"}),
}


def run(base: str, data: str, output: Path, **options: Any) -> Result:
    chosen = {"steps": 12, "batch_size": 4, "lr": 1e-2, "samples": 2, "sample_length": 3}
    return tune(Recipe.of(chosen, {"base": base, "data": data, "output": str(output), "device": "cpu"}, options))


@pytest.mark.filterwarnings("error:.*trained on other weights")
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_learned_from_its_data_alone(task: str, tmp_path: Path, base: Folder, data: Folder) -> None:
    family, kind, figures = TASKS[task]
    result = run(base(family), data(kind), tmp_path / "out")
    assert result.metrics["task"] == task
    assert result.before is not None and result.after is not None
    assert set(result.after) == {"loss", *figures}
    assert result.after["loss"] < result.before["loss"]
    assert len(result.metrics["losses"]) == 12
    assert len(result.metrics["samples"]["after"]) == (2 if task in ("causal-lm", "seq2seq") else 0)
    assert sorted(path.name for path in result.output.iterdir()) == [
        "adapter", "metrics.json", "recipe.yaml", "report.html",
    ]  # fmt: skip

    # The adapter alone, loaded into the base as it came, is the model that was evaluated.
    torch.manual_seed(1)  # another head than the one that the run began with
    rows = load(data(kind))
    tokenizer = None if family == "vit" else tokenizer_of(base(family))
    prepared = prepare(rows, task, tokenizer, image_size=16)
    labels = None if prepared.labels is None else prepared.labels.id2label
    model = load_base(base(family), task, id2label=labels)
    dw.load(model, result.adapter)
    assert held_out(model, prepared, 4, "cpu") == pytest.approx(result.after, rel=1e-5)


def tokenizer_of(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_several_classes_at_once(tmp_path: Path, base: Folder, data: Folder) -> None:
    result = run(base("bert"), data("several"), tmp_path / "out")
    assert result.before is not None and result.after is not None
    assert set(result.after) == {"loss", "f1", "macro_f1", "auc", "exact"}
    assert result.after["loss"] < result.before["loss"]


def test_packing_learns_the_same_tokens_in_fewer_rows(tmp_path: Path, base: Folder, data: Folder) -> None:
    plain = run(base("llama"), data("completions"), tmp_path / "plain", steps=2, lr=1e-9)
    packed = run(base("llama"), data("completions"), tmp_path / "packed", steps=2, lr=1e-9, packing=True, max_length=32)
    one, other = (result.metrics["data"]["train"] for result in (plain, packed))
    assert other["examples"] < one["examples"] / 2 and other["supervised"] == one["supervised"]
    assert packed.before == pytest.approx(plain.before, rel=1e-5)


def test_the_report_stands_alone(tmp_path: Path, base: Folder, data: Folder) -> None:
    options = {"method": "adalora", "settings": {"init_rank": 3, "target_rank": 2}, "evaluate_every": 4}
    result = run(base("llama"), data("completions"), tmp_path / "out", **options)
    page = result.report.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|@import|url\(|<script|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("<svg") == page.count("</svg>") == 3, "the loss, the budget and the ranks over time"
    assert "held out" in page and "layers.1.mlp.down_proj" in page
    assert result.before is not None and f"{result.before['loss']:.5g}" in page
    for sample in result.metrics["samples"]["after"]:
        assert sample["prompt"].split()[0] in WORDS and sample["prompt"] in page
    assert result.metrics["history"]["ranks"][0][0] == 1
    assert [step for step, _ in result.metrics["evaluations"]] == [4, 8, 12]


def test_metrics_say_what_the_run_took(tmp_path: Path, base: Folder, data: Folder) -> None:
    metrics = run(base("llama"), data("completions"), tmp_path / "out").metrics
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["adapter"]["trainable"] == sum(site["trainable"] for site in metrics["adapter"]["sites"])
    assert metrics["adapter"]["share"] == metrics["adapter"]["trainable"] / metrics["adapter"]["total"]
    assert metrics["throughput"]["tokens_per_second"] > metrics["throughput"]["steps_per_second"] > 0
    assert 0 <= metrics["peak_memory_bytes"] < 4e9
    assert metrics["steps"] == 12 and metrics["resumed_from"] is None


def test_the_written_recipe_gives_the_same_run_again(tmp_path: Path, base: Folder, data: Folder) -> None:
    first = run(base("llama"), data("completions"), tmp_path / "a", steps=None, epochs=1.5)
    again = tune(Recipe.read(tmp_path / "a" / "recipe.yaml", output=str(tmp_path / "b")))
    assert (again.adapter / "adapter.safetensors").read_bytes() == (first.adapter / "adapter.safetensors").read_bytes()
    assert again.metrics["losses"] == first.metrics["losses"] and first.metrics["steps"] == 11


def test_what_was_before_is_the_base_where_a_method_does_not_begin_there(
    tmp_path: Path, base: Folder, data: Folder
) -> None:
    changed = run(base("llama"), data("completions"), tmp_path / "a", method="fourierft", steps=1)
    plain = run(base("llama"), data("completions"), tmp_path / "b", method="lora", steps=1)
    assert changed.before == plain.before
    assert changed.metrics["samples"]["before"] == plain.metrics["samples"]["before"]
    assert changed.metrics["losses"][0][1] != plain.metrics["losses"][0][1], "it begins elsewhere"


def test_the_base_is_left_as_it_was(tmp_path: Path, base: Folder, data: Folder) -> None:
    result = run(base("bert"), data("classes"), tmp_path / "out")
    assert result.tuned is not None
    model = result.tuned.model
    dw.detach(model)
    stored = load_base(base("bert"), "masked-lm").state_dict()
    shared = {name: value for name, value in model.state_dict().items() if name in stored}
    assert len(shared) > 30 and all(torch.equal(value, stored[name]) for name, value in shared.items())


def test_a_method_that_measures_gets_batches(tmp_path: Path, base: Folder, data: Folder) -> None:
    needing = [slug for slug, method in dw.methods().items() if method.needs_data]
    assert needing, "no method measures; drop this test"
    result = run(base("llama"), data("completions"), tmp_path / "out", method=needing[0], settings={}, lr=1e-3)
    assert result.after is not None and result.before is not None and result.after["loss"] < result.before["loss"]


def test_an_output_folder_is_not_overwritten(tmp_path: Path, base: Folder, data: Folder) -> None:
    output = tmp_path / "out"
    result = run(base("llama"), data("completions"), output)
    with pytest.raises(ValueError, match="exists already; give another --output, or --resume"):
        run(base("llama"), data("completions"), output)
    recipe = Recipe.read(output / "recipe.yaml")
    again = tune(recipe, resume=True)
    assert again.finished_before and again.metrics == result.metrics
    with pytest.raises(ValueError, match=r"recipe\.yaml has lr=0\.01, this recipe 0\.5; a run is resumed as it began"):
        tune(Recipe.read(output / "recipe.yaml", lr=0.5), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("kept")
    for resume in (False, True):
        with pytest.raises(ValueError, match="exists already|holds no run to resume"):
            tune(Recipe.read(output / "recipe.yaml", output=str(tmp_path / "other")), resume=resume)


@pytest.mark.parametrize("task", ["masked-lm", "token-classification", "seq2seq"])
def test_a_stopped_run_goes_on_in_every_task(task: str, tmp_path: Path, base: Folder, data: Folder) -> None:
    family, kind, _ = TASKS[task]
    whole = run(base(family), data(kind), tmp_path / "whole", save_every=4, steps=11)

    def stop(event: str, **figures: Any) -> None:
        if event == "step" and figures["step"] == 10:  # in the second epoch
            raise KeyboardInterrupt

    recipe = Recipe.read(tmp_path / "whole" / "recipe.yaml", output=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, progress=stop)
    heard = []
    again = tune(recipe, resume=True, progress=lambda event, **figures: heard.append((event, figures.get("step"))))
    assert again.resumed == 8 and ("resumed", 8) in heard
    assert (again.adapter / "adapter.safetensors").read_bytes() == (whole.adapter / "adapter.safetensors").read_bytes()
    assert again.metrics["losses"] == whole.metrics["losses"] and again.after == whole.after


def test_nothing_held_out_is_said(tmp_path: Path, base: Folder, data: Folder) -> None:
    result = run(base("llama"), data("completions"), tmp_path / "out", steps=2, validation=0)
    assert result.before is None and result.after is None
    assert "Nothing was held out" in result.report.read_text()
    assert result.metrics["samples"]["after"], "samples come from the training rows then"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e30, "clip": 0, "steps": 6}, "the loss is (nan|inf) at step .; give a lower --lr than 1e"),
        ({"task": "sequence-classification"}, "task sequence-classification learns from text-label"),
        ({"settings": {"on": "nonsense"}}, "on='nonsense' matches nothing in LlamaForCausalLM"),
        ({"device": "tpu"}, "device='tpu' is not known"),
        ({"settings": {"rank": 0}}, "rank=0 is not allowed"),
        ({"columns": {"prompt": "question"}}, "no column 'question'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    options: dict[str, Any], message: str, tmp_path: Path, base: Folder, data: Folder
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(base("llama"), data("completions"), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
