"""AutoPEFT: several methods as one adapter, on chosen blocks."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.families import FAMILIES


def made(**settings) -> tuple[torch.nn.Module, dict, dw.Tuned]:
    torch.manual_seed(0)
    model, batch = FAMILIES["llama"]()
    return model, batch, dw.attach(model, dw.method("autopeft", **settings), seed=0)


def output(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_each_method_trains_what_it_trains_alone() -> None:
    methods = {"pfeiffer": {"reduction": 8}, "lora": {"rank": 2}, "prefix_tuning": {"length": 3, "hidden": None}}
    _, _, whole = made(methods=methods)
    alone = 0
    for slug, settings in methods.items():
        model, _ = FAMILIES["llama"]()
        alone += dw.attach(model, dw.method(slug, **settings)).summary().trainable
    assert whole.summary().trainable == alone


def test_the_count_is_the_papers_formula_and_the_biases() -> None:
    sizes = {
        "pfeiffer": {"reduction": 8},
        "parallel_adapter": {"size": 3},
        "prefix_tuning": {"length": 2, "hidden": None},
    }
    model, _ = FAMILIES["bert"]()
    tuned = dw.attach(model, dw.method("autopeft", methods=sizes, layers=[1]))
    width = model.config.hidden_size
    serial = width // 8
    biases = (serial + width) + (3 + width)
    assert tuned.summary().trainable == 2 * width * (serial + 3 + 2) + biases


def test_methods_at_one_weight_add_up() -> None:
    model, batch, tuned = made(methods={"lora": {"rank": 2}, "krona": {}}, layers=[0])
    with torch.no_grad():
        for index, parameter in enumerate(tuned.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.02)
    both = output(model, batch)
    dw.merge(model)
    torch.testing.assert_close(output(model, batch), both, atol=1e-4, rtol=1e-4)


def test_only_the_chosen_blocks_change() -> None:
    model, _, tuned = made(methods={"lora": {}, "parallel_adapter": {"size": 2}}, layers=[1])
    assert {part.site.block for part in tuned.parts()} == {1}
    assert dw.detach(model) is model


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    model, batch, tuned = made(methods={"lora": {"rank": 2}, "vera": {"rank": 4}, "pfeiffer": {}})
    wanted = output(model, batch)
    dw.save(tuned, tmp_path)
    dw.detach(model)
    dw.load(model, tmp_path)
    assert torch.equal(output(model, batch), wanted)


def test_each_method_keeps_its_own_rates() -> None:
    _, _, tuned = made(methods={"lora": {"b_lr_ratio": 16.0}, "bitfit": {}})
    groups = {group["lr"]: group["names"] for group in tuned.parameter_groups(1e-3)}
    assert set(groups) == {1e-3, 16e-3}
    assert all(name.endswith(".b") and "lora__" in name for name in groups[16e-3])


def test_a_methods_rules_see_its_own_parts_only() -> None:
    model, batch, tuned = made(methods={"prefix_tuning": {"length": 3, "hidden": 8}, "lora": {}, "adalora": {}})
    run = tuned.run(4, optimizer=torch.optim.AdamW(tuned.parameter_groups(1e-3)))
    assert all(rule.slug in ("prefix_tuning", "adalora") for rule in run.rules)
    run.emit("attached")
    before = {name for name, _ in tuned.named_parts()}
    for _ in range(4):
        run.emit("step_begin")
        loss = model(**batch).logits.pow(2).mean()
        penalty = run.penalty()
        (loss if penalty is None else loss + penalty).backward()
        run.emit("gradients")
        run.run.optimizer.step()
        run.emit("step_end")
        run.run.optimizer.zero_grad()
    run.emit("finished")
    kinds = {name: type(part).__name__ for name, part in tuned.named_parts()}
    assert before == set(kinds)
    assert all(kind == "PrefixKV" for name, kind in kinds.items() if "prefix_tuning__" in name)
    assert all(kind == "LowRank" for name, kind in kinds.items() if ".lora__" in name)


def test_what_cannot_stand_together_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="autopeft itself"):
        dw.method("autopeft", methods={"autopeft": {}})
    with pytest.raises(ValueError, match="did you mean lora"):
        dw.method("autopeft", methods={"loraa": {}})
    with pytest.raises(ValueError, match="there is no block 7"):
        made(layers=[7])
    with pytest.raises(ValueError, match="list of block numbers"):
        dw.method("autopeft", layers=[])


def test_a_members_own_rate_at_an_embedding_is_kept() -> None:
    model, _ = FAMILIES["llama"]()
    methods = {"lora_plus": {"on": ["embedding", "attention"], "rank": 2}}
    tuned = dw.attach(model, dw.AutoPEFT(methods=methods), seed=0)
    rates = {name: group["lr"] for group in tuned.parameter_groups(1e-3) for name in group["names"]}
    assert {rate for name, rate in rates.items() if "embed" in name} == {1e-6}
    assert {rate for name, rate in rates.items() if "embed" not in name} == {1e-3, 16e-3}


def test_two_members_that_begin_their_rates_anew_leave_the_runs_alone() -> None:
    model, batch = FAMILIES["llama"]()
    methods = {"cola_chain": {"rank": 2}, "mora": {"rank": 2, "kind": "share", "merge_every": 3, "warmup": 1}}
    tuned = dw.attach(model, dw.AutoPEFT(methods=methods), seed=0)
    optimizer = torch.optim.SGD(tuned.parameter_groups(1e-3))
    rules = tuned.run(6, optimizer=optimizer)
    rules.emit("attached")
    for _ in range(6):
        rules.step(lambda: model(**batch).loss)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
