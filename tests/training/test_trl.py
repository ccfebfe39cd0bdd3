"""TRL's trainers, used directly with our part in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import deltaworks as dw
from deltaworks.training import DeltaworksMixin, wrap
from deltaworks.training.unfused import is_fused, unfuse
from tests.families import FAMILIES

from .conftest import words

ARGUMENTS: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2,
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "max_length": 16,
}  # fmt: skip
COMPLETIONS = Dataset.from_list([{"prompt": words(3, i), "completion": " " + words(4, 100 + i)} for i in range(8)])
PREFERENCES = Dataset.from_list(
    [
        {"prompt": words(3, i), "chosen": " " + words(4, 100 + i), "rejected": " " + words(4, 200 + i)}
        for i in range(8)
    ]
)


class Sft(DeltaworksMixin, SFTTrainer):
    """The other way to write `wrap(SFTTrainer)`."""


def adapted(**settings: Any) -> tuple[Any, dw.Tuned]:
    model, _ = FAMILIES["llama"]()
    return model, dw.attach(model, dw.LoRA(rank=2, **settings), seed=0)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trains_the_adapter_and_resumes(tmp_path: Path, tokenizer: Any) -> None:
    model, tuned = adapted()
    trainer = Sft(model, SFTConfig(str(tmp_path), **ARGUMENTS), train_dataset=COMPLETIONS, processing_class=tokenizer)
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(FAMILIES["llama"]()[0].parameters(), base_of(model), strict=True))
    model, again = adapted()
    args = SFTConfig(str(tmp_path), **ARGUMENTS)
    resumed = wrap(SFTTrainer)(model, args, train_dataset=COMPLETIONS, processing_class=tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(trainer)
    assert all(torch.equal(value, again.tensors()[name]) for name, value in tuned.tensors().items())


def base_of(model: Any) -> list[torch.Tensor]:
    return [value for name, value in model.named_parameters() if ".deltaworks." not in name]


@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_of_dpo_is_the_base_without_a_second_model(
    tmp_path: Path, tokenizer: Any, precompute: bool
) -> None:
    model, tuned = adapted(dropout=0.3)
    with torch.no_grad():  # a policy that is not its base from the first step on
        for parameter in tuned.parameters():
            parameter.add_(0.05)
    args = DPOConfig(str(tmp_path), precompute_ref_log_probs=precompute, **ARGUMENTS)
    trainer = wrap(DPOTrainer)(model=model, args=args, train_dataset=PREFERENCES, processing_class=tokenizer)
    assert sum(parameter.numel() for parameter in trainer.ref_model.parameters()) == 0
    trainer.train()

    model, other = adapted(dropout=0.3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05)
    args = DPOConfig(str(tmp_path / "explicit"), **ARGUMENTS)
    second = FAMILIES["llama"]()[0]
    explicit = wrap(DPOTrainer)(
        model=model, ref_model=second, args=args, train_dataset=PREFERENCES, processing_class=tokenizer
    )
    explicit.train()
    assert losses(trainer) == pytest.approx(losses(explicit), rel=1e-5)
    assert losses(trainer)[0] != pytest.approx(0.6931, abs=1e-3)


def test_two_kinds_of_adapters_at_once_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    from peft import LoraConfig

    config = SFTConfig(str(tmp_path), **ARGUMENTS)
    with pytest.raises(ValueError, match="leave peft_config out"):
        Sft(adapted()[0], config, train_dataset=COMPLETIONS, processing_class=tokenizer, peft_config=LoraConfig())


def test_a_changed_head_is_seen_by_trl(tmp_path: Path, tokenizer: Any) -> None:
    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.LoRA(rank=2, on="head"), seed=0)
    before = {name: value.clone() for name, value in tuned.tensors().items()}
    trainer = Sft(model, SFTConfig(str(tmp_path), **ARGUMENTS), train_dataset=COMPLETIONS, processing_class=tokenizer)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in tuned.tensors().items())
    ids = tokenizer(COMPLETIONS[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        with dw.disable(model):
            other = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(scores, expected)
    assert not torch.allclose(scores, other)


def test_figures_of_logits_are_those_of_the_fused_head() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, batch = FAMILIES["llama"]()
    fields = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    add_fused_lm_head(model, outputs=fields)
    assert is_fused(model)
    fused = model(**batch, fused_lm_head=True)
    unfuse(model)
    assert not is_fused(model)
    plain = model(**batch, fused_lm_head=True)
    for field in (*fields, "loss", "label_mask"):
        torch.testing.assert_close(getattr(plain, field).float(), getattr(fused, field).float(), rtol=1e-4, atol=1e-5)
    assert model(**batch).loss.item() == pytest.approx(fused.loss.item(), rel=1e-5)
