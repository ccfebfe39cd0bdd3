"""PiSSA starts in the weight's principal directions and leaves the base alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltaworks as dw
from deltaworks.core.init import svd_lowrank
from deltaworks.methods.lowrank.pissa import split
from deltaworks.model.anatomy import describe
from deltaworks.model.loading import load_base
from deltaworks.model.rounding import rounding
from deltaworks.model.weights import Weight
from tests.methods.toys import attach, net, nudge, part


def start(**settings):
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.PiSSA, rank=3, **settings)
    return model, x, base, tuned


def test_the_output_does_not_change_at_the_start() -> None:
    model, x, base, _ = start()
    assert torch.allclose(model(x), base, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("tokens", [5, 2000])  # on a CPU, few are multiplied in the factors' precision
def test_nor_does_that_of_a_base_in_lower_precision(dtype: torch.dtype, bound: float, tokens: int) -> None:
    model, _ = net(64, 48, 32)
    model = model.to(dtype)
    x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    base = model(x).float()
    attach(model, dw.PiSSA, rank=3)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert (model(x).float() - base).norm() <= bound * base.norm()


def test_the_product_is_the_best_approximation_of_the_weight() -> None:
    for settings in ({"niter": None}, {"niter": 16}, {"niter": None, "alpha": 12.0}):
        model, _, _, tuned = start(**settings)
        delta, weight = part(tuned), model.first.weight
        error = (weight - delta.scale * delta.b @ delta.a).norm()
        tail = torch.linalg.svdvals(weight)[3:].norm()
        assert abs(error / tail - 1) < 1e-4


def test_the_factors_share_every_singular_value_evenly() -> None:
    _, _, _, tuned = start(niter=None)
    delta = part(tuned)
    assert torch.allclose(delta.a.norm(dim=1), delta.b.norm(dim=0))


def test_both_factors_have_a_gradient_at_the_first_step() -> None:
    model, x, _, tuned = start()
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in tuned.parameters())


def test_it_is_an_ordinary_lora_of_twice_the_rank_on_the_untouched_base() -> None:
    _, _, _, tuned = start()
    nudge(tuned)
    delta = part(tuned)
    a, b = torch.cat([delta.a, delta.a0]), torch.cat([delta.b, -delta.b0], dim=1)
    assert torch.allclose(delta.dense(), delta.scale * b @ a)
    assert torch.linalg.matrix_rank(delta.dense()) == 6


def test_the_start_is_stored_and_never_trained() -> None:
    _, _, _, tuned = start()
    names = {name.rsplit(".", 1)[-1] for name in tuned.tensors()}
    assert names == {"a", "b", "a0", "b0"}
    assert {name.rsplit(".", 1)[-1] for name, _ in tuned.named_parameters()} == {"a", "b"}


def wide() -> nn.Module:
    """A small Llama whose weights fall off like a trained one's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for site in describe(model).select("all"):
            weight = model.get_parameter(f"{site.path}.weight")
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u * 2.0 ** -torch.arange(u.shape[1]).div(4) @ vh)
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_the_quantised_residual_loses_less_than_the_quantised_weight(kind: str, tmp_path) -> None:
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    tokens = torch.arange(16).view(2, 8)
    base = wide()
    wanted = {name: value.clone() for name, value in base.state_dict().items() if name.endswith("proj.weight")}
    logits = base(tokens).logits
    base.save_pretrained(tmp_path / "whole")
    tuned = split(base, dw.PiSSA(rank=8, niter=None), quantize=kind)
    assert torch.allclose(base(tokens).logits, logits, atol=1e-4), "before it is quantised nothing is lost"
    base.save_pretrained(tmp_path / "residual", state_dict=bare(base))
    dw.save(tuned, tmp_path / "adapter")
    plain = load_base(tmp_path / "whole", quantize=kind)
    ours = load_base(tmp_path / "residual", quantize=kind)
    tuned = dw.load(ours, tmp_path / "adapter")
    for delta in tuned.parts():
        name = f"{delta.site.path}.weight"
        error = wanted[name] - Weight(ours.get_submodule(delta.site.path)).dense() - delta.dense()
        assert error.norm() < 0.6 * (wanted[name] - Weight(plain.get_submodule(delta.site.path)).dense()).norm()
    assert (ours(tokens).logits - logits).norm() < (plain(tokens).logits - logits).norm()


def test_more_iterations_lose_less() -> None:
    pytest.importorskip("bitsandbytes")

    def lost(iterations: int) -> float:
        base, whole = wide(), wide()
        through = rounding("nf4", describe(base))
        total = 0.0
        for delta in split(base, dw.PiSSA(rank=8, niter=None), iterations=iterations).parts():
            residual = base.get_parameter(f"{delta.site.path}.weight").detach()
            total += float(
                (whole.get_parameter(f"{delta.site.path}.weight") - through(residual) - delta.dense()).detach().norm()
            )
        return total

    assert lost(5) < lost(1)


def test_a_split_base_can_not_be_split_again_nor_one_that_is_quantised() -> None:
    base = wide()
    split(base, dw.PiSSA(rank=2))
    with pytest.raises(ValueError, match="nothing attached"):
        split(base, dw.PiSSA(rank=2))
    with pytest.raises(ValueError, match="whole linear layers that are not quantised; .*embed_tokens"):
        split(wide(), dw.PiSSA(rank=2, on="embedding"))


def bare(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own tensors of an adapted model."""
    return {name: value for name, value in model.state_dict().items() if "deltaworks" not in name.split(".")}


def test_the_fast_svd_is_torchs_and_its_draws_are_the_cpus() -> None:
    for shape in ((12, 20), (20, 12)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        theirs = torch.svd_lowrank(matrix, q=3, niter=2)
        torch.manual_seed(0)
        ours = svd_lowrank(matrix, 3, 2)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    after = torch.random.get_rng_state()
    svd_lowrank(torch.empty(6, 4, device="meta"), 2, 1)
    assert not torch.equal(torch.random.get_rng_state(), after), "drawn on the CPU, wherever the matrix is"
