"""CapaBoost: masked copies of one method raise its rank and share its parameters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaworks as dw
from deltaworks.core.costs import size_on
from deltaworks.core.method import Method
from deltaworks.core.operators.boosted import form_of
from deltaworks.core.operators.masks import masks_of as masks_of_tensor
from deltaworks.core.operators.tensor_train import TrainLowRank
from deltaworks.core.part import Delta, Part
from tests.families import FAMILIES
from tests.methods.toys import assert_stored_and_merged, attach, net, nudge, part

LORA = {"rank": 2, "alpha": 4.0}


def test_it_starts_as_the_base_with_loras_parameters() -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.CapaBoost, inner=LORA)
    assert torch.equal(model(x), base)
    assert sum(p.numel() for p in tuned.parameters()) == 2 * (12 + 8 + 8 + 6)


def test_the_rank_of_the_change_is_copies_times_loras_and_the_sum_of_masked_products() -> None:
    model, x = net(12, 8, 6)
    base = model.first(x)
    tuned = attach(model, dw.CapaBoost, inner=LORA, copies=3, density=0.4)
    nudge(tuned)
    delta = part(tuned)
    assert int(torch.linalg.matrix_rank(delta.dense())) == 6 == delta.rank
    masks = zip(delta.a_masks, delta.b_masks, strict=True)
    expected = 2.0 * sum((delta.b * mask_b) @ (delta.a * mask_a) for mask_a, mask_b in masks)
    assert torch.allclose(delta.dense(), expected) and torch.allclose(model.first(x), base + x @ expected.T)
    assert all(int(mask.sum()) == int(0.4 * mask.numel()) for mask in (*delta.a_masks, *delta.b_masks))


def test_density_one_is_lora_at_copies_times_the_scale() -> None:
    (model, x), (twin, _) = net(12, 8, 6), net(12, 8, 6)
    boosted = attach(model, dw.CapaBoost, inner=LORA, density=1.0)
    lora = attach(twin, dw.LoRA, rank=2, alpha=8.0)
    for tuned in (boosted, lora):
        nudge(tuned)
    assert torch.allclose(model(x), twin(x), atol=1e-12)


def test_masks_differ_between_copies_matrices_and_layers_and_come_back_from_a_file(tmp_path) -> None:
    model, x = net(8, 8, 8)
    tuned = attach(model, dw.CapaBoost, inner=LORA)
    first, second = tuned.parts()
    assert not torch.equal(first.a_masks[0], first.a_masks[1])
    assert not torch.equal(first.a_masks, second.a_masks)
    assert not any(name.endswith("_masks") for name in tuned.tensors())
    nudge(tuned)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = net(8, 8, 8)
    loaded = list(dw.load(fresh, tmp_path / "adapter").parts())
    assert torch.equal(loaded[0].a_masks, first.a_masks) and torch.equal(loaded[1].b_masks, second.b_masks)
    assert torch.equal(fresh(x), model(x))


def test_entries_masked_everywhere_have_no_gradient() -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.CapaBoost, inner=LORA, density=0.3)
    nudge(tuned)
    model(x).square().sum().backward()
    delta = part(tuned)
    hidden = ~delta.a_masks.any(0)
    assert hidden.any() and delta.a.grad[hidden].abs().max() == 0 and (delta.a.grad[~hidden] != 0).all()


def test_two_of_four() -> None:
    model, _ = net(12, 8, 4)
    delta = part(attach(model, dw.CapaBoost, inner=LORA, pattern="nm"))
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in delta.a_masks)
    with pytest.raises(ValueError, match="multiple of 4"):
        attach(net(3, 3, 3)[0], dw.CapaBoost, inner={"rank": 1}, pattern="nm")
    with pytest.raises(ValueError, match="keeps half"):
        dw.CapaBoost(pattern="nm", density=0.3)


@pytest.mark.parametrize(
    ("over", "inner"),
    [
        ("vera", {"rank": 4}),
        ("lora_fa", {"rank": 2}),
        ("c3a", {"block": 2}),
        ("fourierft", {"n": 9}),
        ("surm", {}),
        ("loha", {"rank": 2}),
    ],
)
def test_it_boosts_other_methods(over: str, inner: dict, tmp_path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.CapaBoost, over=over, inner=inner)
    nudge(tuned)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters())
    single, _ = net(12, 8, 6)
    count = sum(p.numel() for p in dw.attach(single, dw.method(over, on=torch.nn.Linear, **inner)).parameters())
    assert sum(p.numel() for p in tuned.parameters()) == count
    assert_stored_and_merged(model, net(12, 8, 6)[0], x, tmp_path)


def test_what_masks_would_break_is_refused_by_name() -> None:
    for over in ("pissa", "dora", "adalora", "lora_ga", "capaboost"):
        with pytest.raises(ValueError, match=over):
            attach(net(12, 8, 6)[0], dw.CapaBoost, over=over)


def masks_of(part: Part) -> dict[str, Tensor]:
    """The masks of a part's tensors, by the tensors' names."""
    return {n.removesuffix("_masks"): mask for n, mask in part.named_buffers() if n.endswith("_masks")}


@torch.no_grad()
def under(part: Part, masks: dict[str, Tensor], number: int) -> Part:
    """A copy of a part with the masks of one of its copies on its tensors."""
    made = copy.deepcopy(part)
    for name, mask in masks.items():
        made.get_parameter(name).mul_(mask[number])
    return made


@pytest.mark.parametrize(
    ("over", "inner"),
    [
        ("lora_fa", {"rank": 2}),
        ("qr_lora", {"rank": 2}),
        ("lora_sp", {"rank": 2, "dropout": 0.0, "grain": "matrix"}),
        ("share_lora", {"rank": 2, "share": "ab"}),
    ],
)
def test_frozen_packed_and_shared_factors_are_masked_as_well(over: str, inner: dict) -> None:
    (model, x), (twin, _) = net(40, 30, 20), net(40, 30, 20)
    base = model.first(x)
    boosted = attach(model, dw.CapaBoost, over=over, inner=inner, copies=3)
    plain = attach(twin, dw.methods()[over], **inner)
    assert torch.equal(model.first(x), base)
    for tuned in (boosted, plain):
        nudge(tuned)
    delta, (a, b) = part(boosted), part(plain).factors()
    pairs = zip(delta.a_masks, delta.b_masks, strict=True)
    expected = part(plain).scale * sum((b * mask_b) @ (a * mask_a) for mask_a, mask_b in pairs)
    assert torch.allclose(delta.dense(), expected) and torch.allclose(model.first(x), base + x @ expected.T)
    assert int(torch.linalg.matrix_rank(part(plain).dense())) == 2
    assert int(torch.linalg.matrix_rank(expected)) == 6
    assert sum(p.numel() for p in boosted.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize(
    ("over", "inner", "masked"),
    [
        ("vera", {"rank": 4}, {"lambda_d", "lambda_b"}),
        ("randlora", {"rank": 4}, {"lam", "gamma"}),
        ("svfit", {}, {"shift"}),
        ("svft", {}, {"shift"}),
        ("svft", {"pattern": "banded"}, {"m"}),
    ],
)
def test_constants_that_layers_share_or_find_in_the_weight_stay_whole_and_come_back(
    over: str, inner: dict, masked: set[str], tmp_path
) -> None:
    (model, x), (twin, _) = net(12, 8, 6), net(12, 8, 6)
    base = model(x)
    boosted = attach(model, dw.CapaBoost, over=over, inner=inner)
    plain = attach(twin, dw.methods()[over], **inner)
    assert torch.equal(model(x), base)
    told = size_on(copy.deepcopy(net(12, 8, 6)[0]).to("meta"), dw.CapaBoost(over=over, inner=inner, on=nn.Linear))
    assert told["trainable"] == plain.summary().trainable == boosted.summary().trainable
    for tuned in (boosted, plain):
        nudge(tuned)
    for mine, theirs in zip(boosted.parts(), plain.parts(), strict=True):
        masks = masks_of(mine)
        assert set(masks) == masked
        copies = [under(theirs, masks, i).dense() for i in range(2)]
        assert torch.allclose(mine.dense(), sum(copies)) and not torch.allclose(*copies)
    expected = model(x)
    assert not torch.allclose(expected, base)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = net(12, 8, 6)
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), expected)
    for one in (fresh, model):
        dw.detach(one)
        assert torch.equal(one(x), base)


def test_fused_experts_find_their_singular_vectors_again(tmp_path) -> None:
    model, batch = FAMILIES["mixtral"]()
    base = model(**batch).logits
    nudge(dw.attach(model, dw.CapaBoost(over="svfit", on="expert.down"), seed=0), 0.5)
    expected = model(**batch).logits
    assert not torch.allclose(expected, base)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = FAMILIES["mixtral"]()
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).logits, expected)


@pytest.mark.parametrize("over", ["lora", "vera", "miss", "mora", "randlora"])
def test_dropout_acts_on_the_input_of_all_copies_in_training(over: str) -> None:
    model, _ = net(12, 8, 6)
    x = torch.eye(12, dtype=torch.float64).repeat(20, 1)  # one feature a row, which is dropped or not
    base = model.first(x)
    tuned = attach(model, dw.CapaBoost, over=over, inner={"rank": 4, "dropout": 0.5})
    nudge(tuned)
    dense = part(tuned).dense()
    torch.manual_seed(0)
    change = model.first(x) - base
    gone = change.abs().amax(1) < 1e-12
    assert 60 < gone.sum() < 180 and torch.allclose(change[~gone], 2 * (x @ dense.T)[~gone])
    model.eval()
    assert torch.allclose(model.first(x), base + x @ dense.T)


def test_what_would_be_ignored_is_refused_in_one_line() -> None:
    for over, inner in (("lora", {"on": "mlp"}), ("vera", {"overrides": {"first": {"rank": 2}}})):
        with pytest.raises(ValueError, match=f"capaboost: inner has {next(iter(inner))}="):
            dw.CapaBoost(over=over, inner=inner)
    with pytest.raises(ValueError, match="row_dropout and module_dropout do not act"):
        attach(net(12, 8, 6)[0], dw.CapaBoost, over="lokr", inner={"row_dropout": 0.5})
    with pytest.raises(ValueError, match="keeps the share 0.01 of 24 entries keeps none"):
        attach(net(12, 8, 6)[0], dw.CapaBoost, inner=LORA, density=0.01)


def test_overrides_reach_the_masks_and_the_boosted_method() -> None:
    model, _ = net(12, 8, 6)
    places = {"first": {"copies": 3, "inner": {"rank": 5}}, "second": {"copies": 4}, ".*": {"inner": {"rank": 1}}}
    tuned = attach(model, dw.CapaBoost, inner=LORA, overrides=places)
    assert [(delta.rank, delta.scale) for delta in tuned.parts()] == [(15, 16 / 5), (8, 2.0)]
    with pytest.raises(ValueError, match="over is the same at all places"):
        dw.CapaBoost(overrides={"first": {"over": "vera"}})


def test_tensors_keep_the_boosted_methods_names_and_rates() -> None:
    groups = []
    for method, settings in ((dw.CapaBoost, {"over": "lora_plus"}), (dw.methods()["lora_plus"], {})):
        tuned = attach(net(12, 8, 6)[0], method, **settings)
        groups.append([(group["names"], group["lr"]) for group in tuned.parameter_groups(1.0)])
    assert groups[0] == groups[1] and len(groups[0]) > 1


MODULES = [
    ("houlsby", {"size": 4}, "llama"),
    ("pfeiffer", {"reduction": 8}, "bert"),  # around a norm
    ("parallel_adapter", {"size": 4, "learn_scale": True}, "bert"),  # beside two modules
    ("parallel_adapter", {"size": 4, "activation": "tanh"}, "llama"),
    ("krona_b", {}, "llama"),
    ("loretta_adp", {}, "bert"),
    ("surm_adp", {}, "llama"),
]
modules = pytest.mark.parametrize(("over", "inner", "family"), MODULES)


def adapted(family: str, method: Method, size: float = 0.3) -> tuple[nn.Module, dict, dw.Tuned]:
    model, batch = FAMILIES[family]()
    tuned = dw.attach(model, method, seed=0)
    nudge(tuned, size)
    return model, batch, tuned


@modules
def test_it_boosts_what_changes_activations_copy_by_copy(over: str, inner: dict, family: str) -> None:
    _, _, boosted = adapted(family, dw.CapaBoost(over=over, inner=inner, copies=3))
    _, _, plain = adapted(family, dw.method(over, **inner))
    assert boosted.summary().trainable == plain.summary().trainable
    seen = 0
    for mine, theirs in zip(boosted.parts(), plain.parts(), strict=True):
        masks = masks_of(mine)
        if not masks:  # a tap, or the shift of a norm
            assert type(mine) is type(theirs) and (isinstance(mine, Delta) or not list(mine.parameters()))
            continue
        seen += 1
        assert set(masks) == {name for name, p in theirs.named_parameters() if p.dim() > 1}
        y, r = torch.randn(2, 3, 5, 32)
        expected, whole = y, theirs.added(y, r)
        for i in range(3):
            expected = under(theirs, masks, i).added(expected, r)
        assert torch.allclose(mine.added(y, r), expected, atol=1e-5)
        assert not torch.allclose(expected, whole, atol=1e-2)
    assert seen


@modules
def test_one_whole_copy_is_the_boosted_method_at_its_place(over: str, inner: dict, family: str) -> None:
    boosted, batch, _ = adapted(family, dw.CapaBoost(over=over, inner=inner, copies=1, density=1.0))
    plain, _, _ = adapted(family, dw.method(over, **inner))
    assert torch.equal(boosted(**batch).logits, plain(**batch).logits)
    with dw.disable(plain):
        assert not torch.allclose(boosted(**batch).logits, plain(**batch).logits, atol=1e-3)


@modules
def test_boosted_modules_are_parts_like_any_other(over: str, inner: dict, family: str, tmp_path) -> None:
    method = dw.CapaBoost(over=over, inner=inner)
    assert not method.mergeable and method.exact_at_start == dw.methods()[over].exact_at_start
    model, batch = FAMILIES[family]()
    base, classes = model(**batch).logits, [type(module) for module in model.modules()]
    told = size_on(copy.deepcopy(model).to("meta"), method)
    tuned = dw.attach(model, method, seed=0)
    assert told["trainable"] == tuned.summary().trainable
    assert torch.equal(model(**batch).logits, base) == method.exact_at_start
    nudge(tuned, 0.3)
    expected = model(**batch).logits
    with dw.disable(model):
        assert torch.equal(model(**batch).logits, base)
    with pytest.raises(ValueError, match="capaboost cannot be merged"):
        dw.merge(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).logits, expected)
        nudge(dw.tuned(twin), 0.3)
        assert not torch.allclose(twin(**batch).logits, expected, atol=1e-3)
    dw.save(model, tmp_path / "adapter")
    fresh, _ = FAMILIES[family]()
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).logits, expected)
    nudge(dw.attach(model, dw.LoRA(), name="second", seed=0), 0.3)
    assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
    dw.activate(model, "default")
    assert torch.equal(model(**batch).logits, expected)
    dw.detach(model)
    assert torch.equal(model(**batch).logits, base)
    assert [type(module) for module in model.modules()] == classes


def test_the_gradient_of_a_shared_entry_is_the_sum_over_the_copies() -> None:
    _, _, tuned = adapted("llama", dw.CapaBoost(over="parallel_adapter", inner={"size": 4, "scale": 2.0}))
    boosted = next(tuned.parts()).double()
    y, r, g = torch.randn(3, 2, 5, 32, dtype=torch.float64)
    downs, ups = (
        [(getattr(boosted, name) * mask).detach().requires_grad_() for mask in masks_of(boosted)[name]]
        for name in ("down", "up")
    )
    bias, up_bias = (getattr(boosted, name).detach().requires_grad_() for name in ("down_bias", "up_bias"))
    copies = [2.0 * (F.relu(r @ d.T + bias) @ u.T + up_bias) for d, u in zip(downs, ups, strict=True)]
    result = boosted.added(y, r)
    assert torch.allclose(result, y + sum(copies))
    (result * g).sum().backward()
    ((y + sum(copies)) * g).sum().backward()
    for name, untied in (("down", downs), ("up", ups)):
        tied = sum(mask * one.grad for mask, one in zip(masks_of(boosted)[name], untied, strict=True))
        assert torch.allclose(getattr(boosted, name).grad, tied)
    assert torch.allclose(boosted.down_bias.grad, bias.grad) and torch.allclose(boosted.up_bias.grad, up_bias.grad)


@pytest.mark.parametrize("over", ["prompt_tuning", "full", "lst", "ia3", "mov", "bitfit", "rst_lora", "lisa"])
def test_what_copies_cannot_be_added_up_of_is_refused_in_one_line(over: str) -> None:
    with pytest.raises(ValueError, match=f"capaboost: over='{over}' ") as refusal:
        dw.attach(FAMILIES["gpt2"]()[0], dw.CapaBoost(over=over))
    assert "\n" not in str(refusal.value)


PREFIX = {"length": 3, "hidden": 16}


def test_a_prefix_without_an_mlp_is_refused() -> None:
    with pytest.raises(ValueError, match="capaboost: over='prefix_tuning' at .* copies of PrefixKV do not add up"):
        dw.attach(FAMILIES["gpt2"]()[0], dw.CapaBoost(over="prefix_tuning", inner={"hidden": None}))


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_every_linear_map_of_a_prefix_mlp_is_the_sum_of_masked_copies(family: str) -> None:
    _, _, tuned = adapted(family, dw.CapaBoost(over="prefix_tuning", inner=PREFIX, copies=3, density=0.4))
    _, _, plain = adapted(family, dw.PrefixTuning(**PREFIX))
    assert tuned.summary().trainable == plain.summary().trainable
    drawn = []

    def copied(owner: Any, name: str, x: Tensor) -> Tensor:
        linear = owner.get_submodule(name)
        masks = masks_of_tensor(f"{name}.weight", linear.weight.shape, (3, 0.4, "equal", owner.seed))
        drawn.append(masks)
        assert all(int(mask.sum()) == int(0.4 * mask.numel()) for mask in masks)
        return sum((F.linear(x, linear.weight * mask) for mask in masks), linear.bias)

    parts = list(tuned.parts())
    for one in parts:
        inner = torch.tanh(copied(one.encoder, f"down.{one.kind}", one.encoder.embedding[one.kind]))
        expected = copied(one, "up", inner).view(3, 2, one.heads, one.size).permute(1, 2, 0, 3)
        assert torch.allclose(torch.stack(one.table()), expected, atol=1e-5)
    assert len(parts) > 1
    for first, second in ((drawn[0][0], drawn[0][1]), (drawn[1], drawn[3])):  # of copies, and of layers
        assert not torch.equal(first, second)


def test_a_prefix_mlp_under_masks_that_keep_all_is_prefix_tuning() -> None:
    boosted, batch, _ = adapted("llama", dw.CapaBoost(over="prefix_tuning", inner=PREFIX, copies=1, density=1.0))
    plain, _, _ = adapted("llama", dw.PrefixTuning(**PREFIX))
    assert torch.equal(boosted(**batch).logits, plain(**batch).logits)


def test_weights_of_a_prefix_mlp_that_no_mask_keeps_have_no_gradient() -> None:
    model, batch, tuned = adapted("gpt2", dw.CapaBoost(over="prefix_tuning", inner=PREFIX, density=0.3))
    model(**batch).logits.square().sum().backward()
    one = next(tuned.parts())
    for linear in (one.up, one.encoder.down[0]):
        hidden = linear.times == 0
        assert hidden.any() and (linear.weight.grad[hidden] == 0).all() and linear.weight.grad[~hidden].any()


@pytest.mark.parametrize("form", ["deltaworks", "peft"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_boosted_prefix_is_stored_without_masks_and_as_a_table(form: str, finished: bool, tmp_path) -> None:
    inner = {**PREFIX, "positions": "shifted"}
    model, batch, tuned = adapted("llama", dw.CapaBoost(over="prefix_tuning", inner=inner))
    expected = model(**batch).logits
    if finished:
        tuned.run(1).emit("finished")
        assert all(name.endswith((".key", ".value")) for name in tuned.tensors())
    assert not any("times" in name or "mask" in name for name in tuned.tensors())
    dw.save(model, tmp_path / "adapter", format=form)
    fresh, _ = FAMILIES["llama"]()
    dw.load(fresh, tmp_path / "adapter")
    assert torch.allclose(fresh(**batch).logits, expected, atol=1e-6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).logits, model(**batch).logits)
    if form == "deltaworks" and not finished:
        assert torch.equal(next(dw.tuned(fresh).parts()).up.times, next(tuned.parts()).up.times)


def test_tensors_of_submodules_are_masked_under_their_names() -> None:
    delta = TrainLowRank(12, 8, bottleneck=2, train_rank=2, subtract=False)
    form = form_of(delta)
    assert form is not None
    made = form(delta, 2, 0.5, "equal", 0)
    assert list(made.tensors()) == list(delta.tensors()) == list(masks_of(made))
    assert torch.allclose(made.dense(), sum(under(delta, masks_of(made), i).dense() for i in range(2)))
    again = form.remade(made.configuration(), made.tensors(), {})
    assert torch.equal(again.dense(), made.dense())


@pytest.mark.parametrize("settings", [{"density": 1e-6}, {"overrides": {".*": {"copies": 3}}}])
def test_what_a_prefixs_shared_map_cannot_follow_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="^capaboost: over='prefix_tuning'"):
        dw.attach(FAMILIES["gpt2"]()[0], dw.CapaBoost(over="prefix_tuning", inner=PREFIX, **settings))
