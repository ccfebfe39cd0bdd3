"""LoRA+: B learns faster than A, in LoRA (of which more in `test_lora`) and in other methods with such factors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.training.recipe import Recipe
from tests.conformance.subject import batches, build
from tests.methods.toys import assert_stored_and_merged, attach, net, nudge, part, steps

OVER = pytest.mark.parametrize(
    ("over", "inner"),
    [
        ("dora", {"rank": 2}),
        ("adalora", {"init_rank": 3, "target_rank": 2, "t_init": 1, "t_final": 1, "interval": 1}),
        ("melora", {"ranks": [1, 3]}),
        ("nlora", {"rank": 2}),
        ("rslora", {"rank": 3}),
        ("capaboost", {"inner": {"rank": 2}}),
    ],
)


def rates(tuned: dw.Tuned) -> dict[str, float]:
    """Every tensor's rate, at a rate of 1 of the run."""
    groups = tuned.parameter_groups(1.0, weight_decay=0.1)
    found = {name: group["lr"] for group in groups for name in group["names"]}
    assert sorted(found) == sorted(name for group in groups for name in group["names"])
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in tuned.parameters()}
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_the_groups_are_those_of_peft(dora: bool) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=3, target_modules=["first", "second"], use_dora=dora)
    theirs = peft.get_peft_model(net()[0], config)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    names = {id(p): name for name, p in theirs.named_parameters()}
    wanted = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    model, _ = net()
    settings = {"over": dw.DoRA(rank=3)} if dora else {"rank": 3}
    ours = attach(model, dw.LoRAPlus, **settings).parameter_groups(1e-3)
    found = {name: group["lr"] for group in ours for name in group["names"]}
    assert len(found) == len(wanted)
    called = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}
    for name, rate in found.items():
        layer, tensor = name.split(".")[0], called[name.rpartition(".")[2]]
        assert rate == pytest.approx(wanted[f"base_model.model.{layer}.{tensor}.default.weight"])


def test_vectors_learn_as_fast_as_b_and_do_not_decay() -> None:
    tuned = attach(net()[0], dw.LoRAPlus, over=dw.DoRA(rank=2), b_lr_ratio=4.0)
    groups = tuned.parameter_groups(0.5, weight_decay=0.25)
    found = {name.removeprefix("first.weight."): group for group in groups for name in group["names"]}
    assert {name: (found[name]["lr"], found[name]["weight_decay"]) for name in ("a", "b", "magnitude")} == {
        "a": (0.5, 0.25), "b": (2.0, 0.25), "magnitude": (2.0, 0.0)
    }  # fmt: skip


@OVER
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_at_a_ratio_of_one_it_is_the_method_bit_for_bit(over: str, inner: dict, decay: float) -> None:
    def trained(method: Method) -> list[torch.Tensor]:
        model, x = net(12, 8, 6)
        tuned = dw.attach(model, method, seed=0)
        list(steps(model, x, tuned, 4, decay=decay))
        return [p.detach() for p in tuned.parameters()]

    plain = trained(dw.method(over, on=nn.Linear, **inner))
    one, sixteen = (
        trained(dw.LoRAPlus(over=over, inner=inner, on=nn.Linear, b_lr_ratio=ratio)) for ratio in (1.0, 16.0)
    )
    assert all(map(torch.equal, plain, one))
    assert len(plain) == len(sixteen) and not all(map(torch.equal, plain, sixteen))


@OVER
def test_the_ratio_outlasts_a_scheduler(over: str, inner: dict) -> None:
    tuned = attach(net(12, 8, 6)[0], dw.LoRAPlus, over=over, inner=inner)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-3))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(7):
        optimizer.step()
        schedule.step()
        slow, *_, fast = sorted(group["lr"] for group in optimizer.param_groups)
        assert fast / slow == pytest.approx(16)


def test_every_method_is_told_apart_by_its_tensors_or_refused() -> None:
    taken = set()
    for slug in dw.methods():
        if slug in ("lora_plus", "mezo"):
            with pytest.raises(ValueError, match="already|by itself"):
                dw.LoRAPlus(over=slug)
            continue
        method = dw.LoRAPlus(over=slug)
        assert method.needs_data == dw.method(slug).needs_data
        data = batches("llama") if method.needs_data else None
        try:
            tuned = dw.attach(build("llama")[0], method, data=data, seed=0)
        except ValueError as refusal:
            assert str(refusal).startswith(f"lora_plus: over='{slug}' trains no factor B")
            continue
        taken.add(slug)
        plain = dw.method(slug)
        shapes = {name: p.dim() for name, p in tuned.named_parameters()}
        base = dict(build("llama")[0].named_parameters())
        for name, rate in rates(tuned).items():
            if name in base:  # what trains in place is the run's
                continue
            own = plain.group_of(name).get("lr_scale", 1.0)
            leaf = name.removesuffix(f".{name.rpartition('.')[2]}").rpartition(".")[2]
            leaf = leaf if name.rpartition(".")[2].isdigit() else name.rpartition(".")[2]
            vector = shapes[name] == 1 and leaf not in ("a", "b")  # some entries of a factor are no vector
            assert rate == own * (16 if vector or leaf in ("b", "p", "left_out") else 1), (slug, name)
    assert {"lora", "dora", "adalora", "melora", "nlora", "eva", "loretta_rep", "rosa", "share_lora"} <= taken
    assert not {"vera", "ia3", "full", "boft", "loha", "bitfit", "inttune", "mezo", "prompt_tuning"} & taken


@OVER
def test_it_comes_back_from_files_and_merges(over: str, inner: dict, tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.LoRAPlus, over=over, inner=inner, b_lr_ratio=4.0)
    nudge(tuned)
    assert_stored_and_merged(model, (fresh := net(12, 8, 6)[0]), x, tmp_path)
    loaded = dw.tuned(fresh)
    assert loaded.method == tuned.method and loaded.method.over == over
    assert rates(loaded) == rates(tuned) and set(rates(loaded).values()) == {1.0, 4.0}


def test_peft_s_file_is_that_of_the_method_under_it(tmp_path) -> None:
    model, x = net(12, 8, 6)
    nudge(attach(model, dw.LoRAPlus, over="dora", inner={"rank": 2}))
    dw.save(model, tmp_path / "peft", format="peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_dora"]
    fresh, _ = net(12, 8, 6)
    assert dw.load(fresh, tmp_path / "peft").method.slug == "dora"
    assert torch.allclose(fresh(x), model(x))


def test_a_method_is_given_itself_or_by_its_slug() -> None:
    given = dw.LoRAPlus(over=dw.DoRA(rank=4, on=nn.Linear), overrides={"first": {"inner": {"rank": 2}}})
    assert (given.over, given.inner, given.on) == ("dora", {"rank": 4}, nn.Linear)
    assert [one.a.shape[0] for one in dw.attach(net()[0], given).parts()] == [2, 4]
    assert dw.LoRAPlus(over="DoRA", inner={"rank": 4}) == dw.method("lora-plus", over="dora", inner='{"rank": 4}')
    assert part(attach(net()[0], dw.LoRAPlus, over=dw.LoRA(rank=3, rslora=True))).scale == 16 / 3**0.5
    assert dw.LoRAPlus().under == dw.LoRA() and dw.LoRAPlus(rank=4, on="mlp").under == dw.LoRA(rank=4, on="mlp")


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_an_embedding_has_its_own_rate_whatever_the_run_s(ratio: float) -> None:
    model, _ = build("llama")
    places = ["embed_tokens", "q_proj"]
    tuned = dw.attach(model, dw.LoRAPlus(rank=2, on=places, b_lr_ratio=ratio, embedding_lr=1e-5), seed=0)
    for lr in (1e-3, 1.0):
        groups = tuned.parameter_groups(lr)
        found = {name: group["lr"] for group in groups for name in group["names"]}
        for name, rate in found.items():
            assert rate == (1e-5 if "embed" in name else lr * ratio if name.endswith(".b") else lr)
        assert len([n for n in found if "embed" in n]) == 2
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert min(group["lr"] for group in optimizer.param_groups) == pytest.approx(5e-6)
    assert dw.LoRAPlus().embedding_lr == 1e-6


def test_overrides_reach_the_ratio_alone() -> None:
    tuned = attach(net()[0], dw.LoRAPlus, over="dora", overrides={"second": {"b_lr_ratio": 2.0}})
    found = rates(tuned)
    assert (found["first.weight.b"], found["second.weight.b"], found["second.weight.magnitude"]) == (16, 2, 2)


def test_experts_have_their_ratio() -> None:
    tuned = dw.attach(build("mixtral")[0], dw.LoRAPlus(over="dora", on="expert.down"), seed=0)
    assert {name.rpartition(".")[2]: rate for name, rate in rates(tuned).items()} == {"magnitude": 16, "a": 1, "b": 16}


def test_rules_and_statistics_of_the_method_are_its_own() -> None:
    tuned = attach(net(12, 8, 6)[0], dw.LoRAPlus, over="adalora", inner={"init_rank": 3, "target_rank": 2})
    assert [type(rule) for rule in tuned.rules] == [type(rule) for rule in dw.method("adalora").rules()] != []


def test_recipes_name_the_method_as_others() -> None:
    made = Recipe.of({"method": "lora_plus", "settings": {"over": "dora", "inner": {"rank": 4}}}).made()
    assert made == dw.LoRAPlus(over=dw.DoRA(rank=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"over": "nothing"}, "there is no method 'nothing'"),
        ({"over": 3}, "over=3 is not allowed; it must be a method or its slug"),
        ({"over": "lora_plus"}, "over='lora_plus' has a ratio already"),
        ({"over": "capaboost", "inner": {"over": "lora_plus"}}, "over='capaboost' has a ratio already"),
        ({"over": "dora", "rank": 4}, "rank=4 is for over='lora', not dora"),
        ({"inner": {"rank": 4}, "rank": 2}, "rank=2 is for inner="),
        ({"over": "dora", "inner": {"on": "mlp"}}, "inner has on='mlp'; give lora_plus itself on="),
        ({"over": "rslora", "inner": {"b_lr_ratio": 2.0}}, "inner has b_lr_ratio=2.0"),
        ({"over": "dora", "inner": {"n": 2}}, "dora has no hyper-parameter 'n'"),
        ({"overrides": {"first": {"over": "dora"}}}, "over is the same at all places"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        dw.LoRAPlus(**settings)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="inner=.* beside over=DoRA"):
        dw.LoRAPlus(over=dw.DoRA(), inner={"rank": 4})


def test_what_an_embedding_shares_with_other_layers_is_no_embeddings() -> None:
    model, _ = build("llama")
    tuned = dw.attach(model, dw.LoRAPlus(over="share_lora", on=["embedding", "attention"]), seed=0)
    found = {name: group["lr"] for group in tuned.parameter_groups(1e-3) for name in group["names"]}
    slow = {name for name, rate in found.items() if rate == 1e-6}
    assert slow and all("embed" in name for name in slow)
    assert not any("bank" in name and "embed" not in name for name in slow)
