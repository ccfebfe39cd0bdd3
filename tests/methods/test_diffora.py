"""DiffoRA: a search for the weights that should learn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import deltaworks as dw
from deltaworks.core.experts import PerExpert
from deltaworks.core.operators.gated import Gated
from deltaworks.core.operators.lent_factors import LentLowRank
from deltaworks.core.operators.low_rank import LowRank
from deltaworks.training import wrap
from tests.families import FAMILIES
from tests.methods.resuming import trained
from tests.methods.toys import attach, net, nudge, part, steps

SETTINGS = {"rank": 2, "search": 6, "warmup": 2, "keep": 0.5}


def decoder(**settings):
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.DiffoRA(**(SETTINGS | settings)), seed=0)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2))
    return model, batch, tuned, optimizer, tuned.run(46, seed=1, optimizer=optimizer)


def searched(count: int = 6, loss=lambda model, batch: model(**batch).loss, **settings):
    model, batch, tuned, optimizer, rules = decoder(**settings)
    rules.emit("attached")
    for _ in range(count):
        optimizer.zero_grad()
        rules.emit("step_begin")
        loss(model, batch).backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
    return model, batch, tuned, optimizer, rules


def test_the_gate_is_a_sigmoid_of_theta() -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.DiffoRA, rank=2, alpha=6.0)
    assert torch.equal(model(x), base)
    nudge(tuned)
    delta = part(tuned)
    assert isinstance(delta, Gated)
    expected = 3.0 / (1 + math.exp(-float(delta.theta.detach()))) * delta.b @ delta.a
    assert torch.allclose(delta.dense(), expected)


def test_thetas_learn_from_one_half_of_the_steps_and_factors_from_the_other() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.DiffoRA, **(SETTINGS | {"search": 8}))
    tensors = dict(tuned.named_parameters())
    before = {name: p.detach().clone() for name, p in tensors.items()}
    for step in steps(model, x, tuned, 20, decay=0.1):
        if step == 8:
            break
        # Steps 1 and 2 are the warm-up; then factors and thetas take turns.
        thetas = step > 2 and step % 2 == 0
        for name, p in tensors.items():
            moved = not torch.equal(p, before[name])
            own = name.endswith("theta")
            assert moved == (own == thetas) or (step == 1 and name.endswith(".a") and moved), (step, name)
            before[name] = p.detach().clone()


def test_thetas_make_adam_steps_by_their_own_gradient() -> None:
    _, _, tuned, _, rules = decoder(warmup=0, search=8)
    rules.emit("attached")
    rules.run.step = 1
    thetas = [p.theta for p in tuned.parts()]
    twins = [torch.nn.Parameter(t.detach().clone()) for t in thetas]
    adam = torch.optim.Adam(twins, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for theta, twin in zip(thetas, twins, strict=True):
            theta.grad = torch.randn(1, generator=generator)
            twin.grad = theta.grad.clone()
        rules.emit("gradients")
        adam.step()
        assert all(theta.grad is None for theta in thetas)
    for theta, twin in zip(thetas, twins, strict=True):
        assert torch.allclose(theta, twin, atol=1e-7)


def test_every_block_keeps_its_share_and_the_others_of_a_kind_hold_the_same_tensors() -> None:
    model, batch, tuned, _, rules = searched()
    with torch.no_grad(), dw.disable(model):
        base = model(**batch).logits
    assert torch.allclose(model(**batch).logits, base)  # all begin anew, with B = 0
    parts = dict(tuned.named_parts())
    for block in (0, 1):
        mine = [p for p in parts.values() if p.site.block == block]
        assert len(mine) == 7 and sum(isinstance(p, LowRank) for p in mine) == 4
        assert all(isinstance(p, (LowRank, LentLowRank)) for p in mine)
    assert {name for name, p in parts.items() if isinstance(p, LowRank)} == set(rules.rules[0].chosen)
    shared = [p for p in parts.values() if isinstance(p, LentLowRank)]
    for one in shared:
        for other in shared:
            same = one.factors()[0] is other.factors()[0] and one.factors()[1] is other.factors()[1]
            assert same == (one.site.role == other.site.role)
    assert all(p.factors()[0].any() for p in parts.values())


def test_the_optimizer_holds_what_trains_now_and_it_learns() -> None:
    model, batch, tuned, optimizer, rules = searched()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in tuned.parameters()]
    assert not optimizer.state
    with torch.no_grad():
        before = model(**batch).loss
    for _ in range(6):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
    assert model(**batch).loss < before - 0.01
    assert len(optimizer.state) == len(tuned.parameters())


def test_without_sharing_the_others_stay_as_they_are() -> None:
    model, batch, tuned, _, rules = searched(share=False)
    assert [name for name, _ in tuned.named_parts()] == [
        name for name in (n for n, _ in decoder()[2].named_parts()) if name in rules.rules[0].chosen
    ]
    assert sum(p.numel() for p in tuned.parameters()) == sum(2 * (p.a.shape[1] + p.b.shape[0]) for p in tuned.parts())
    model(**batch).loss.backward()
    dw.detach(model)
    assert not [name for name in model.state_dict() if "deltaworks" in name]


@pytest.mark.parametrize("role", ["v_proj", "down_proj"])
def test_what_alone_matters_is_selected_in_every_layer(role: str) -> None:
    def planted(model, batch):
        # The loss asks for a change of one kind of weight and punishes every other.
        loss = 0.0
        for name, p in dw.tuned(model).named_parts():
            if isinstance(p, Gated):
                change = p.dense()
                target = torch.sin(torch.arange(change.numel(), dtype=change.dtype)).view_as(change)
                loss = loss + ((change - target) if role in name else change).square().mean()
        return loss

    _, _, tuned, _, rules = searched(40, planted, search=40, warmup=20, keep=1 / 7)
    assert rules.rules[0].chosen == [f"model.layers.{i}.{b}.{role}.weight" for i in (0, 1)
                                     for b in (("mlp",) if role == "down_proj" else ("self_attn",))]  # fmt: skip
    assert tuned.parameters()


@pytest.mark.parametrize(("family", "share", "stops"), [("llama", True, (1, 5, 6, 9)), ("mixtral", False, (4, 8))])
def test_it_resumes_at_any_step_bit_for_bit(family: str, share: bool, stops: tuple[int, ...], tmp_path: Path) -> None:
    method = dw.DiffoRA(**SETTINGS, share=share)
    whole, history, _ = trained(method, tmp_path, family, steps=12)
    for stop in stops:
        resumed, again, _ = trained(method, tmp_path, family, steps=12, stop=stop)
        assert list(whole) == list(resumed) and history == again, stop
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), stop


def test_the_selected_form_is_saved_with_its_shared_pairs_once(tmp_path: Path) -> None:
    model, batch, tuned, optimizer, _ = searched()
    model(**batch).loss.backward()
    optimizer.step()
    expected = model(**batch).logits
    dw.save(model, tmp_path / "adapter")
    fresh, _ = FAMILIES["llama"]()
    loaded = dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).logits, expected)
    assert sum(t.numel() for t in loaded.tensors().values()) == sum(p.numel() for p in tuned.parameters())


def test_experts_that_are_not_chosen_have_one_change_in_common_and_can_be_saved(tmp_path: Path) -> None:
    method = dw.DiffoRA(rank=2, search=3, warmup=1, keep=0.4, on=["attention", "mlp"])
    tuned = trained(method, tmp_path, "mixtral", steps=8)[2]
    stacks = [part for _, part in tuned.of_kind(LentLowRank) if isinstance(part, PerExpert)]
    assert stacks and not any(part.tensors() for part in stacks), "all that they have is lent"
    change = stacks[0].dense()
    assert change.any() and all(torch.equal(one, change[0]) for one in change)
    model, batch = FAMILIES["mixtral"]()
    dw.save(tuned.model, tmp_path / "adapter")
    dw.load(model, tmp_path / "adapter")
    assert torch.equal(model(**batch).logits, tuned.model(**batch).logits)


def test_a_search_as_long_as_the_run_is_refused() -> None:
    tuned = decoder(search=12)[2]
    with pytest.raises(ValueError, match="search takes 12 of the run's 12 steps"):
        tuned.run(12).emit("attached")


def test_a_best_checkpoint_from_the_search_is_not_taken_for_the_result(tmp_path: Path) -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.DiffoRA(**SETTINGS), seed=0)
    rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
    args = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=1, learning_rate=1e-2, save_steps=4, eval_steps=4,
        eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = wrap(Trainer)(model, args, train_dataset=rows, eval_dataset=rows)
    with pytest.warns(UserWarning, match="is from before diffora exchanged parts"):
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert all(isinstance(p, (LowRank, LentLowRank)) for p in tuned.parts())
    assert any(p.factors()[1].any() for p in tuned.parts()), "what was learnt after the search is kept"


def test_places_keep_their_own_rank_scale_and_dropout() -> None:
    own = {r"layers\.0\..*": {"rank": 4, "alpha": 2.0, "dropout": 0.25}}
    model, batch, tuned, _, _ = searched(alpha=6.0, overrides=own)
    assert {type(part) for part in tuned.parts()} == {LowRank, LentLowRank}
    for one in tuned.parts():
        assert (one.rank, one.scale, one.dropout) == ((4, 0.5, 0.25) if one.site.block == 0 else (2, 3.0, 0.0))
    model.train()
    model(**batch).loss.backward()


def test_a_search_has_steps_for_the_thetas() -> None:
    rules = decoder(search=0.3, warmup=0.1)[2].run(4)
    rules.emit("attached")
    selection = rules.rules[0]
    assert [selection.of_thetas(step, rules.run) for step in range(selection.end(rules.run))] == [False, True]
    decoder(search=6, warmup=4)[2].run(12).emit("attached")
    with pytest.raises(ValueError, match="diffora: warmup takes 5 of the search's 6 steps"):
        decoder(search=6, warmup=5)[2].run(12).emit("attached")


def test_a_share_that_keeps_nothing_is_refused_unless_the_others_share() -> None:
    with pytest.raises(ValueError, match="diffora: keep=0.07 of 7 weights is none"):
        searched(keep=0.07, share=False)
    _, _, tuned, _, _ = searched(keep=0.07)
    assert all(isinstance(part, LentLowRank) for part in tuned.parts())
    assert len(list(searched(keep=0.08, share=False)[2].parts())) == 2
