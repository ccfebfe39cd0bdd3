"""Second moments are those of all activations at once, whatever the batches and passes."""

from __future__ import annotations

import pytest
import torch
import transformers

from deltaworks.model.anatomy import describe
from deltaworks.statistics import SecondMoment, second_moments
from tests.families import FAMILIES


def seen(model: torch.nn.Module, path: str, batches: list) -> torch.Tensor:
    """Every visible token's input of a module, `tokens x width`, float64."""
    kept: list[torch.Tensor] = []
    masks = iter([batch["attention_mask"].bool() for batch in batches])
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: kept.append(a[0][next(masks)].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(kept)


def test_the_running_moment_is_the_moment_of_everything() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 5) * 3 + 1
    moment, other = SecondMoment(5), SecondMoment(5)
    for part in x[:40].split([1, 22, 17]):
        moment.update(part)
    other.update(x[40:].reshape(2, 10, 5))
    moment.merge(other)
    exact = x.double()
    assert moment.count == 60
    assert torch.allclose(moment.mean, exact.mean(0), atol=1e-5)
    assert torch.allclose(moment.uncentred, exact.T @ exact / 60, rtol=1e-5)
    assert torch.allclose(moment.covariance, torch.cov(exact.T, correction=0), rtol=1e-4, atol=1e-5)


def test_principal_directions_are_the_right_singular_vectors() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 6) @ torch.diag(torch.tensor([5.0, 3, 2, 1, 0.5, 0.1]))
    moment = SecondMoment(6)
    moment.update(x)
    values, vectors = moment.principal(3)
    _, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    assert torch.allclose(values, s[:3].square() / 50, rtol=1e-4)
    assert torch.allclose((vh[:3] @ vectors).abs(), torch.eye(3, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("per_pass", [None, 1])
def test_a_models_moments_leave_padding_out(per_pass: int | None) -> None:
    model, batch = FAMILIES["llama"]()
    batches = [batch, {k: v.flip(0) for k, v in batch.items()}]
    paths = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    measured = dict(second_moments(model, paths, batches, per_pass=per_pass))
    for path in paths:
        x = seen(model, path, batches)
        assert measured[path].count == len(x) < 2 * batch["input_ids"].numel()
        assert torch.allclose(measured[path].uncentred, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_a_diagonal_moment_of_outputs() -> None:
    model, batch = FAMILIES["bert"]()
    path = "bert.encoder.layer.0.output.dense"
    ((_, moment),) = second_moments(model, [path], [batch], outputs=True, diagonal=True)
    assert moment.products.shape == (32,)
    with pytest.raises(ValueError, match="no principal directions"):
        moment.principal(1)


def test_the_model_is_left_as_it_was_and_silence_is_an_error() -> None:
    model, batch = FAMILIES["bert"]()
    model.train()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    list(second_moments(model, ["cls.predictions.decoder"], [batch]))
    assert model.training and all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="read no activations"):
        list(second_moments(model, ["cls.predictions.decoder"], []))
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("written", [5, 12])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_is_read_and_what_is_written_have_padding_of_their_own(family: str, written: int) -> None:
    model, _ = FAMILIES[family]()
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    shown, labels = torch.ones_like(ids), ids[:, :written].clone()
    shown[1, 8:], labels[0, -2:] = 0, -100
    base = describe(model)
    stacks = {block.path: block.stack for block in base.blocks}

    def of(stack: str, role: str) -> str:
        return next(
            site.path for site in base.sites
            if site.role == role and site.kind == "linear" and stacks[base.blocks[site.block].path] == stack
        )  # fmt: skip

    read = [of("encoder", "attention.query"), of("encoder", "mlp.down"), of("decoder", "cross_attention.value")]
    wrote = [of("decoder", "attention.key"), of("decoder", "cross_attention.query"), of("decoder", "mlp.up")]
    batch = {"input_ids": ids, "attention_mask": shown, "labels": labels}
    for answers in (False, True):
        counts = {path: one.count for path, one in second_moments(model, read + wrote, [batch], answers=answers)}
        assert {counts[path] for path in read} == {20} and {counts[path] for path in wrote} == {2 * written - 2}


def test_a_decoder_that_reads_the_text_again_has_its_padding() -> None:
    model, _ = FAMILIES["bart"]()
    model = transformers.BartForSequenceClassification(model.config).eval()
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = model.config.eos_token_id
    shown = torch.ones_like(ids)
    shown[1, :4] = 0
    site = "model.decoder.layers.0.fc1"
    batch = {"input_ids": ids, "attention_mask": shown, "labels": torch.tensor([0, 1])}
    ((_, moment),) = second_moments(model, [site], [batch])
    assert moment.count == 20
