"""Every method that keeps more than its parts, in rules or shared tensors, survives a checkpoint of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.training import wrap
from tests.families import FAMILIES

ROWS = torch.randint(5, 64, (8, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in ROWS]
KEEPING = [
    slug
    for slug, method in dw.methods().items()
    if (method.rules is not Method.rules or method.shared is not Method.shared) and "llama" not in method.refuses
]


def trained(slug: str, output: Path, start: Path | None, **arguments: Any) -> tuple[dict[str, torch.Tensor], Any]:
    model, _ = FAMILIES["llama"]()
    method = dw.method(slug)
    measured = [{"input_ids": ROWS[:2], "labels": ROWS[:2]}] if method.needs_data else None
    tuned = dw.attach(model, method, seed=0, data=measured)
    args = TrainingArguments(
        str(output), max_steps=6, per_device_train_batch_size=2, learning_rate=method.default_lr, save_steps=4,
        logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = wrap(Trainer)(model, args, train_dataset=DATA)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    return tuned.tensors(), trainer.rules.run.history


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("slug", KEEPING)
def test_a_resumed_method_is_the_one_that_went_on(slug: str, tmp_path: Path) -> None:
    whole, history = trained(slug, tmp_path, None)
    resumed, again = trained(slug, tmp_path, tmp_path / "checkpoint-4", save_strategy="no")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert history == again
