"""EVA: A spans what a layer reads, ranks go where the variance is, and the budget is kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.model.anatomy import describe
from deltaworks.model.loading import load_base
from deltaworks.statistics import second_moments
from tests.families import FAMILIES

ON = ["attention.query", "attention.key", "attention.value", "mlp.down"]


def data(count: int = 3) -> tuple[nn.Module, list[dict]]:
    model, _ = FAMILIES["llama"]()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (4, 24), generator=generator) for _ in range(count)]
    return model, [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]


def test_the_start_is_the_base_and_the_rows_are_orthonormal_principal_directions() -> None:
    model, batches = data()
    base = model(**batches[0]).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = dict(second_moments(model, ["model.layers.0.mlp.down_proj"], batches))
    tuned = dw.attach(model, dw.EVA(on=ON, rank=4), data=batches, seed=0)
    assert torch.equal(model(**batches[0]).logits, base)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    for part in tuned.parts():
        assert torch.allclose(part.a @ part.a.T, torch.eye(len(part.a)), atol=1e-5)
        assert part.b.abs().max() == 0 and part.scale == 1 / 4
    found = next(part for name, part in tuned.named_parts() if "layers.0.mlp.down" in name).a.double()
    _, exact = moments["model.layers.0.mlp.down_proj"].principal(len(found), centred=True)
    cosines = torch.linalg.svdvals(found @ exact)
    assert (1 - cosines).abs().max() < 1e-4


def test_the_directions_capture_as_much_variance_as_an_exact_svd_of_what_was_read() -> None:
    model, batches = data()
    read: dict[str, list[torch.Tensor]] = {site.path: [] for site in describe(model).select(ON)}
    for batch in batches:
        batch["attention_mask"][1, -7:] = 0
        shown = batch["attention_mask"].bool()
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(lambda _, x, r=r, m=shown: r.append(x[0][m].detach()))
            for path, r in read.items()
        ]
        model(**batch)
        for hook in hooks:
            hook.remove()
    for part in dw.attach(model, dw.EVA(on=ON, rank=4), data=batches, seed=0).parts():
        x = torch.cat(read[part.site.path]).double()
        x -= x.mean(0)
        _, values, rows = torch.linalg.svd(x, full_matrices=False)
        assert (x @ part.a.double().T).square().sum() > 0.9999 * values[: part.rank].square().sum()
        assert torch.linalg.svdvals(part.a.double() @ rows[: part.rank].T).min() > math.cos(0.01)


def test_ranks_follow_explained_variance_within_the_budget() -> None:
    model, batches = data()
    tuned = dw.attach(model, dw.EVA(on=ON, rank=4, rho=2.0), data=batches, seed=0)
    ranks = {part.site.path: part.rank for part in tuned.parts()}
    assert sum(ranks.values()) == 4 * 8 and max(ranks.values()) <= 8 and len(set(ranks.values())) > 1
    # No direction that was left out explains more than one that was taken.
    shares = {}
    for path, moment in second_moments(dw.detach(model), list(ranks), batches):
        values, _ = moment.principal(9, centred=True)
        shares[path] = values / moment.covariance.trace()
    taken = min(float(shares[path][rank - 1]) for path, rank in ranks.items() if rank)
    left = max(float(shares[path][rank]) for path, rank in ranks.items() if rank < 8)
    assert left <= taken * (1 + 1e-6)


def test_without_redistribution_every_layer_has_the_rank() -> None:
    model, batches = data()
    tuned = dw.attach(model, dw.EVA(on=ON, rank=4, rho=1.0), data=batches, seed=0)
    assert {part.rank for part in tuned.parts()} == {4}


def test_layers_that_read_the_same_have_nested_directions() -> None:
    model, batches = data()
    tuned = dw.attach(model, dw.EVA(on=ON, rank=4), data=batches, seed=0)
    parts = {part.site.path: part for part in tuned.parts()}
    query, key = (parts[f"model.layers.1.self_attn.{which}_proj"].a for which in "qk")
    common = min(len(query), len(key))
    assert torch.equal(query[:common], key[:common])


def test_the_same_batches_give_the_same_adapter_measured_one_layer_at_a_time_or_all() -> None:
    made = []
    for per_pass in (1, 8):
        model, batches = data()
        made.append(dw.attach(model, dw.EVA(on=ON, rank=4, per_pass=per_pass), data=iter(batches), seed=0).tensors())
    assert list(made[0]) == list(made[1])
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_hidden_tokens_and_tokens_without_labels_do_not_count() -> None:
    model, batches = data(1)
    batch = batches[0]
    short = {key: value[:, :12] for key, value in batch.items()}
    masked = {**batch, "labels": torch.where(torch.arange(24) < 12, batch["labels"], -100)}
    path = ["model.layers.0.self_attn.q_proj"]
    (_, few), (_, wanted) = (
        next(second_moments(model, path, [masked], answers=True)),
        next(second_moments(model, path, [short])),
    )
    assert few.count == wanted.count == 48
    assert torch.allclose(few.products, wanted.products, rtol=1e-5)


def test_whitening_divides_by_the_root_of_the_singular_value() -> None:
    model, batches = data()
    plain = dw.attach(model, dw.EVA(on=ON, rank=2, rho=1.0), data=batches).tensors()
    dw.detach(model)
    white = dw.attach(model, dw.EVA(on=ON, rank=2, rho=1.0, whiten=True), data=batches)
    (_, moment), name = next(second_moments(model, ["model.layers.0.mlp.down_proj"], batches)), "layers.0.mlp.down"
    values = (moment.principal(2, centred=True)[0] * moment.count).sqrt().sqrt()
    for key, value in white.tensors().items():
        if name in key and key.endswith(".a"):
            assert torch.allclose(value.double() * values[:, None], plain[key].double(), atol=1e-5)


def test_what_it_cannot_see_is_refused_by_name() -> None:
    model, batch = FAMILIES["mixtral"]()
    with pytest.raises(ValueError, match="experts"):
        dw.attach(model, dw.EVA(), data=[batch])
    tuned = dw.attach(model, dw.EVA(on="attention"), data=[batch])
    assert list(tuned.parts())


def test_a_quantised_base_is_measured_like_any_other(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    full, batches = data(1)
    full.save_pretrained(tmp_path)
    model = load_base(tmp_path, quantize="nf4")
    tuned = dw.attach(model, dw.EVA(on=ON, rank=2, rho=1.0), data=batches, seed=0)
    part = next(part for part in tuned.parts() if part.site.path.endswith("0.self_attn.q_proj"))
    # The first layer's queries read what the quantised layers have not touched yet.
    twin = next(dw.attach(full, dw.EVA(on="attention.query", rank=2, rho=1.0), data=batches, seed=0).parts())
    assert torch.linalg.svdvals(part.a @ twin.a.T).min() > 0.99
