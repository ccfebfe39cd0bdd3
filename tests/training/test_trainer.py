"""Our part in transformers' Trainer: events at their moments, penalties, own steps, exact resuming."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

import deltaworks as dw
from deltaworks.core.rule import Rule, Run
from deltaworks.training import wrap
from deltaworks.training.checkpoint import checkpoints, latest, replacing
from tests.families import FAMILIES

ROWS = torch.randint(5, 64, (20, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


class Probe(Rule):
    """Writes down what it is told, with the size of the gradients and of the parameters at that moment."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, float, float]] = []

    def note(self, event: str, run: Run) -> None:
        tensors = run.tuned.parameters()
        gradients = [p.grad.norm() for p in tensors if p.grad is not None]
        size = torch.stack(gradients).norm().item() if gradients else 0.0
        self.heard.append((event, run.step, size, sum(p.detach().norm().item() for p in tensors)))

    def attached(self, run: Run) -> None:
        self.note("attached", run)

    def step_begin(self, run: Run) -> None:
        self.note("step_begin", run)

    def gradients(self, run: Run) -> None:
        self.note("gradients", run)

    def step_end(self, run: Run) -> None:
        self.note("step_end", run)

    def epoch_end(self, run: Run) -> None:
        self.note("epoch_end", run)

    def finished(self, run: Run) -> None:
        self.note("finished", run)


class Shrink(Rule):
    """A penalty whose strength it changes as it goes, so that its state matters."""

    strength = 0.01

    def step_end(self, run: Run) -> None:
        self.strength *= 1.1
        run.record("strength", self.strength)

    def epoch_end(self, run: Run) -> None:
        self.strength *= 0.5

    def penalty(self, run: Run) -> Tensor:
        return self.strength * torch.stack([(p**2).sum() for p in run.tuned.parameters()]).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strength = state["strength"]


class Rotate(Rule):
    """Trains one part at a time; the optimizer forgets the others."""

    def step_begin(self, run: Run) -> None:
        parts = list(run.tuned.parts())
        for index, part in enumerate(parts):
            chosen = index == run.step // 2 % len(parts)
            part.requires_grad_(chosen)
            if not chosen and run.optimizer is not None:
                for parameter in part.parameters():
                    parameter.grad = None
                    run.optimizer.state.pop(parameter, None)


class Guess(Rule):
    """Owns the step: keeps a random move when the loss falls."""

    owns_step = True

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []

    def own_step(self, run: Run, loss: Any, lr: float) -> Tensor:
        before, again = loss(), loss()
        self.losses.append((before.item(), again.item()))
        generator = torch.Generator().manual_seed(run.seed + run.step)
        with torch.no_grad():
            for parameter in run.tuned.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=lr)
        return before


@dataclass(kw_only=True, frozen=True)
class Watched(dw.LoRA):
    """LoRA with rules given from outside."""

    given: Any = field(default_factory=list)

    def rules(self) -> list[Rule]:
        return list(self.given)


def made(
    output: Path, *rules: Rule, dropout: float = 0.0, method: Any = None, **arguments: Any
) -> tuple[Any, dw.Tuned]:
    """A trainer of a tiny decoder, and the handle on its adapter."""
    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, method or Watched(rank=2, dropout=dropout, b_lr_ratio=4.0, given=rules), seed=0)
    chosen = {
        "max_steps": 11, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_steps": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "max_grad_norm": 0.01, "weight_decay": 0.1,
    }  # fmt: skip
    args = TrainingArguments(str(output), **chosen | arguments)
    return wrap(Trainer)(model, args, train_dataset=DATA, eval_dataset=DATA[:4]), tuned


def tensors(tuned: dw.Tuned) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tuned.tensors().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_, **__: None)


def test_rules_hear_the_six_events_at_their_moments(tmp_path: Path) -> None:
    probe = Probe()
    trainer, _ = made(tmp_path, probe, save_strategy="no")
    trainer.train()
    names = [(event, step) for event, step, *_ in probe.heard]
    expected: list[tuple[str, int]] = [("attached", 0)]
    for step in range(11):
        expected += [("step_begin", step), ("gradients", step), ("step_end", step + 1)]
        expected += [("epoch_end", step + 1)] if step + 1 in (5, 10) else []
    assert names == [*expected, ("finished", 11)]
    by_event = {event: [item for item in probe.heard if item[0] == event] for event, *_ in probe.heard}
    for begin, gradients, end in zip(by_event["step_begin"], by_event["gradients"], by_event["step_end"], strict=True):
        assert begin[2] == 0, "an accumulation window begins without gradients"
        assert gradients[2] > 0.1, "gradients are complete and not clipped"
        assert end[2] == pytest.approx(0.01, rel=1e-3), "gradients are still there after the step, clipped"
        assert begin[3] == gradients[3] != end[3], "the optimizer steps between `gradients` and `step_end`"


def test_the_trainer_is_a_plain_loop(tmp_path: Path) -> None:
    trainer, tuned = made(tmp_path, Shrink(), save_strategy="no", train_sampling_strategy="sequential")
    trainer.train()

    model, _ = FAMILIES["llama"]()
    plain = dw.attach(model, Watched(rank=2, b_lr_ratio=4.0, given=(Shrink(),)), seed=0)
    model.train()
    optimizer = torch.optim.AdamW(plain.parameter_groups(1e-2, weight_decay=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 11)
    rules = plain.run(11, optimizer=optimizer)
    rules.emit("attached")
    for step in range(11):
        rules.emit("step_begin")
        for micro in range(2):
            start = (step % 5) * 4 + micro * 2
            batch = ROWS[start : start + 2]
            penalty = rules.penalty()
            assert penalty is not None
            ((model(input_ids=batch, labels=batch).loss + penalty) / 2).backward()
        rules.emit("gradients")
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        optimizer.step()
        rules.emit("step_end")
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            rules.emit("epoch_end")
    rules.emit("finished")
    for name, value in plain.tensors().items():
        torch.testing.assert_close(tuned.tensors()[name], value, rtol=1e-4, atol=1e-5)
    assert trainer.rules.run.history == rules.run.history


def test_learning_rates_keep_their_ratio_under_a_schedule(tmp_path: Path) -> None:
    seen = []

    class Look(Rule):
        def gradients(self, run: Run) -> None:
            assert run.optimizer is not None
            seen.append([group["lr"] for group in run.optimizer.param_groups])

    trainer, _ = made(tmp_path, Look(), save_strategy="no", warmup_steps=3, lr_scheduler_type="cosine")
    trainer.train()
    rates = [sorted(pair) for pair in seen if max(pair) > 0]
    assert len(rates) > 8 and len({round(low, 9) for low, _ in rates}) > 5
    assert all(high == pytest.approx(4 * low) for low, high in rates)


@pytest.mark.parametrize("save_steps", [1, 5])
def test_a_resumed_run_ends_bit_for_bit_like_the_whole_one(tmp_path: Path, save_steps: int) -> None:
    trainer, tuned = made(tmp_path, Shrink(), Rotate(), dropout=0.2, save_steps=save_steps)
    trainer.train()
    whole, history = tensors(tuned), trainer.rules.run.history
    for folder in checkpoints(tmp_path)[:: 4 if save_steps == 1 else 1]:
        again, handle = made(tmp_path / "again", Shrink(), Rotate(), dropout=0.2, save_strategy="no")
        again.train(resume_from_checkpoint=str(folder))
        assert same(whole, tensors(handle)), folder.name
        assert again.rules.run.history == history
        assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == [
            entry["loss"] for entry in trainer.state.log_history if "loss" in entry
        ]


def test_evaluating_leaves_no_trace_in_the_run(tmp_path: Path) -> None:
    trainer, tuned = made(tmp_path / "a", dropout=0.2, save_strategy="no")
    trainer.train()
    model, _ = FAMILIES["llama"]()
    other = dw.attach(model, Watched(rank=2, dropout=0.2, b_lr_ratio=4.0), seed=0)
    args = trainer.args
    args.eval_strategy, args.eval_steps = "steps", 2
    wrap(Trainer)(model, args, train_dataset=DATA, eval_dataset=DATA[:4]).train()
    assert same(tensors(tuned), tensors(other))


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path: Path) -> None:
    trainer, tuned = made(tmp_path, save_total_limit=2)
    trainer.train()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-11"]
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "checkpoint-11" / "adapter.safetensors")) == set(tuned.tensors())
    adapter = sum(tensor.numel() for tensor in tuned.tensors().values()) * 4
    files = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-11").iterdir()}
    assert "model.safetensors" not in files
    assert sum(files.values()) < 3 * adapter + 60_000  # tensors, two moments, headers, random state


def test_a_forgotten_optimizer_state_stays_forgotten_over_a_checkpoint(tmp_path: Path) -> None:
    trainer, tuned = made(tmp_path, Rotate(), max_steps=4)
    trainer.train()
    state = torch.load(latest(tmp_path) / "optimizer.pt", weights_only=True)  # type: ignore[operator]
    assert len(state["state"]) == 2 < len(state["param_groups"][0]["params"])
    assert sum(len(group["params"]) for group in state["param_groups"]) == 2 * len(list(tuned.parts()))


def test_a_rule_can_own_the_step(tmp_path: Path) -> None:
    guess, probe = Guess(), Probe()
    trainer, tuned = made(tmp_path, guess, probe, dropout=0.5)
    before = tensors(tuned)
    trainer.train()
    assert len(guess.losses) == 11 and all(one == again for one, again in guess.losses)
    assert all(parameter.grad is None for parameter in tuned.parameters())
    assert not trainer.optimizer.state_dict()["state"]
    assert not same(before, tensors(tuned))
    assert [event for event, *_ in probe.heard if event == "gradients"] == []
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([one for one, _ in guess.losses])
    resumed, handle = made(tmp_path, Guess(), Probe(), dropout=0.5, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(tensors(tuned), tensors(handle))


def test_an_owned_step_sees_the_loss_of_the_whole_window(tmp_path: Path) -> None:
    guess = Guess()
    trainer, _ = made(tmp_path, guess, max_steps=1, save_strategy="no", train_sampling_strategy="sequential")
    trainer.train()
    model, _ = FAMILIES["llama"]()
    assert guess.losses[0][0] == pytest.approx(model(input_ids=ROWS[:4], labels=ROWS[:4]).loss.item(), rel=1e-5)


def test_a_save_that_dies_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, tuned = made(tmp_path)
    trainer.train()
    whole = tensors(tuned)

    broken, _ = made(tmp_path / "b")
    save = torch.save

    def dying(thing: Any, path: Path) -> None:
        if "checkpoint-6" in str(path) and Path(path).name == "optimizer.pt":
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(thing, path)

    monkeypatch.setattr(torch, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    monkeypatch.undo()
    assert [folder.name for folder in checkpoints(tmp_path / "b")] == ["checkpoint-3"]
    again, handle = made(tmp_path / "b")
    again.train(resume_from_checkpoint=True)
    assert same(whole, tensors(handle))


def test_replacing_a_folder_keeps_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-1"
    for content in ("old", "new"):
        with replacing(final) as folder:
            (folder / "file").write_text(content)
            assert not final.exists() or (final / "file").read_text() == "old"
    assert (final / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_best_adapter_comes_back_at_the_end(tmp_path: Path) -> None:
    # At this rate the loss is lowest by a wide margin after three steps.
    trainer, tuned = made(
        tmp_path, learning_rate=10.0, max_steps=6, eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < 6
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{trainer.state.best_global_step}"
    from safetensors.torch import load_file

    assert same(load_file(best / "adapter.safetensors"), tensors(tuned))


def test_a_checkpoint_keeps_what_callbacks_remember(tmp_path: Path) -> None:
    trainer, _ = made(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_steps=2, metric_for_best_model="loss",
        load_best_model_at_end=True, greater_is_better=False,
    )  # fmt: skip
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=9, early_stopping_threshold=100.0))
    trainer.train()
    kept = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"] == 3
    assert kept["TrainerControl"]["args"]["should_save"]


def test_only_the_model_is_an_adapter_that_can_be_loaded_and_nothing_to_resume_from(tmp_path: Path) -> None:
    trainer, tuned = made(
        tmp_path, method=dw.LoRA(rank=2, b_lr_ratio=4.0), learning_rate=3.0, max_steps=6, eval_strategy="steps",
        eval_steps=1, save_steps=1, load_best_model_at_end=True, save_only_model=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.state.best_global_step < 6
    assert {path.name for path in best.iterdir()} == {"adapter.json", "adapter.safetensors", "trainer_state.json"}
    model, _ = FAMILIES["llama"]()
    assert same(tensors(tuned), tensors(dw.load(model, best))), "the best one came back, and is what the folder holds"
    again, _ = made(tmp_path)
    with pytest.raises(ValueError, match="holds the adapter alone .* cannot be resumed; dw.load takes it up"):
        again.train(resume_from_checkpoint=str(best))


def test_an_adapter_whose_parts_borrow_comes_back_from_an_export(tmp_path: Path) -> None:
    from deltaworks.training.checkpoint import read_adapter

    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.VBLoRA(rank=2, vectors=8, length=8), seed=0)
    held = tensors(tuned)
    dw.save(tuned, tmp_path)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.zero_()
    assert not same(held, tensors(tuned))
    read_adapter(tuned, tmp_path)
    assert same(held, tensors(tuned))


class Hub:
    """Stands for the Hub: keeps the names of the files of every folder that is uploaded."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, set[str]]] = []

    def upload_folder(self, *, folder_path: str, commit_message: str, run_as_future: bool, **_: Any) -> Any:
        self.uploads.append((commit_message, {path.name for path in Path(folder_path).iterdir()}))
        done: Future[None] = Future()
        done.set_result(None)
        return done if run_as_future else "url"


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_what_is_pushed_is_the_adapter(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    known = {"hub_model_id": "me/mine", "push_in_progress": None}
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **_: self.__dict__.update(known))
    trainer, _ = made(tmp_path, push_to_hub=True, max_steps=3, hub_strategy=strategy)
    trainer.train()
    trainer.save_model()
    adapter = {"adapter.json", "adapter.safetensors"}
    assert [message for message, _ in hub.uploads] == {
        "every_save": ["Training in progress, step 3", "Model save"],
        "checkpoint": ["Training in progress, step 3", "Training in progress, step 3, checkpoint", "Model save"],
        "end": ["Model save"],
    }[strategy]
    for message, files in hub.uploads:
        if message.endswith("checkpoint"):
            assert {"adapter.safetensors", "optimizer.pt", "rules.pt"} <= files
        else:
            assert adapter <= files and not {"model.safetensors", "pytorch_model.bin"} & files
    before = len(hub.uploads)
    trainer.push_to_hub()
    assert len(hub.uploads) == before + 1 and adapter <= hub.uploads[-1][1]


def test_gradients_of_another_adapter_do_not_count_for_the_clipping(tmp_path: Path) -> None:
    def trained(beside: bool) -> dict[str, Tensor]:
        model, _ = FAMILIES["llama"]()
        if beside:
            dw.attach(model, dw.LoRA(rank=4), name="other", seed=1)
        tuned = dw.attach(model, dw.LoRA(rank=2), seed=0)
        args = TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=1e-1, optim="sgd", max_grad_norm=0.01, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = wrap(Trainer)(model, args, train_dataset=DATA)
        trainer.train()
        assert not beside or all(p.grad is None for p in dw.tuned(model, "other").parameters())
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        return tensors(tuned)

    norms: list[list[float]] = []
    alone, accompanied = trained(False), trained(True)  # the other one is at its start, where it changes nothing
    assert norms[0] == pytest.approx(norms[1]) and len(norms[0]) == 3
    for name, value in alone.items():
        torch.testing.assert_close(accompanied[name], value, rtol=1e-5, atol=1e-7)


def test_a_run_that_broke_off_leaves_no_batches_to_the_next(tmp_path: Path) -> None:
    guess = Guess()
    trainer, _ = made(tmp_path, guess, max_steps=1, save_strategy="no", train_sampling_strategy="sequential")
    trainer._window.append({"input_ids": ROWS[10:12], "labels": ROWS[10:12]})
    trainer.train()
    model, _ = FAMILIES["llama"]()
    assert guess.losses[0][0] == pytest.approx(model(input_ids=ROWS[:4], labels=ROWS[:4]).loss.item(), rel=1e-5)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    trainer, _ = made(tmp_path, max_steps=3)
    trainer.train()
    model, _ = FAMILIES["llama"]()
    dw.attach(model, dw.LoRA(rank=2, on="attention"))
    other = wrap(Trainer)(model, trainer.args, train_dataset=DATA)
    with pytest.raises(ValueError, match=r"adapter\.safetensors does not fit the adapter 'default' \(lora\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    rules, _ = made(tmp_path / "b", Probe())
    with pytest.raises(ValueError, match="the checkpoint has rules"):
        rules.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "adapter.safetensors").write_bytes(b"half")
    broken, _ = made(tmp_path / "c")
    with pytest.raises(ValueError, match=r"adapter\.safetensors cannot be read"):
        broken.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_model_without_adapter_is_refused(tmp_path: Path) -> None:
    model, _ = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="trains an adapter, LlamaForCausalLM has none"):
        wrap(Trainer)(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))


def test_an_optimizer_that_chooses_its_parameters_is_refused(tmp_path: Path) -> None:
    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.LoRA(rank=2))
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    chooses = (torch.optim.SGD, {"params": tuned.parameters(), "lr": 0.1})
    trainer = wrap(Trainer)(model, args, train_dataset=DATA, optimizer_cls_and_kwargs=chooses)
    with pytest.raises(ValueError, match="chooses its parameters itself"):
        trainer.train()


def test_the_running_statistics_of_a_batch_norm_stay_the_bases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config).eval()
    pixels = 3 + torch.randn(8, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(pixels)]
    handle = dw.attach(model, dw.LoRA(on="conv"))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    wrap(Trainer)(model, args, train_dataset=data).train()
    adapted = model.eval()(pixel_values=pixels).logits
    dw.save(handle, tmp_path / "adapter")
    dw.detach(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.allclose(model(pixel_values=pixels).logits, adapted)
    dw.load(model, tmp_path / "adapter")
    torch.testing.assert_close(model(pixel_values=pixels).logits, adapted)
