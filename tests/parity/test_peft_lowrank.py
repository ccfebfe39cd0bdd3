"""The low-rank pages compute what `peft` computes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.scaled import RandomPair
from deltaworks.model.weights import Weight
from tests.adapters.adapted import assert_agree, family, logits, move, refused
from tests.methods.toys import net
from tests.parity.moved import double_twin, in_double
from tests.parity.twins import assert_equal, close, layer, twins

peft = pytest.importorskip("peft")
BOTH = ["first", "second"]


def factors(layer) -> dict[str, torch.Tensor]:
    return {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}


@pytest.mark.parametrize("rslora", [False, True])
def test_lora(rslora: bool) -> None:
    method = dw.LoRA(on=nn.Linear, rank=3, alpha=5.0, rslora=rslora)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=BOTH, use_rslora=rslora)
    assert_equal(*twins(method, config, factors), factors)


def test_lora_starts_like_theirs() -> None:
    theirs = peft.get_peft_model(net(64, 8, 6)[0], peft.LoraConfig(r=8, target_modules=BOTH))
    ours = dw.attach(net(64, 8, 6)[0], dw.LoRA(on=nn.Linear, rank=8), seed=0)
    a, b = (layer(theirs, "first").lora_A["default"].weight, next(ours.parts()).a)
    assert a.abs().max() <= 1 / 8 and b.abs().max() <= 1 / 8
    assert abs(a.std() / b.std() - 1) < 0.1


def test_lora_fa() -> None:
    from peft.optimizers import create_lorafa_optimizer

    method = dw.LoRAFA(on=nn.Linear, rank=3, alpha=5.0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=BOTH)
    ours, tuned, theirs = twins(method, config, factors)
    create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-3)  # freezes their A
    assert not any(p.requires_grad for n, p in theirs.named_parameters() if "lora_A" in n)
    assert_equal(ours, tuned, theirs, factors)


def test_lora_fa_s_projected_steps() -> None:
    """Theirs adds epsilon before it corrects the second moment's bias, torch's AdamW after: the two are made to agree.

    It is large, so that the gradient's size counts in a step and not its direction alone. Weight decay is left out:
    theirs comes after the step, AdamW's before it.
    """
    from peft.optimizers import create_lorafa_optimizer

    method = dw.LoRAFA(on=nn.Linear, rank=3, alpha=5.0, project=True)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=BOTH)
    ours, tuned, theirs = twins(method, config, factors)
    reference = create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=0.01)
    reference.param_groups[0]["eps"] = 0.01
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.01), weight_decay=0.0)
    rules = tuned.run(3, optimizer=optimizer)
    rules.emit("attached")
    _, x = net()
    for step in (1, 2, 3):
        optimizer.param_groups[0]["eps"] = 0.01 / (1 - 0.999**step) ** 0.5
        optimizer.zero_grad()
        reference.zero_grad()
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        reference.step()
        for name, part in tuned.named_parts():
            moments = optimizer.state[part.b]["exp_avg"]
            close(moments, reference.state[f"base_model.model.{name.split('.')[0]}.lora"]["exp_avg_B"], 1e-8)
            close(part.b, factors(layer(theirs, name))["b"], 1e-8)


def test_dora() -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return factors(layer) | {"magnitude": layer.lora_magnitude_vector["default"].weight}

    method = dw.DoRA(on=nn.Linear, rank=3, alpha=5.0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=BOTH, use_dora=True)
    assert_equal(*twins(method, config, translate), translate)


def test_dora_starts_with_the_same_magnitude() -> None:
    theirs = peft.get_peft_model(net()[0], peft.LoraConfig(r=3, target_modules=BOTH, use_dora=True))
    tuned = dw.attach(net()[0], dw.DoRA(on=nn.Linear, rank=3), seed=0)
    for name, part in tuned.named_parts():
        expected = layer(theirs, name).lora_magnitude_vector["default"].weight
        assert torch.allclose(part.magnitude, expected)


@pytest.mark.parametrize("alpha", [3.0, 12.0])
def test_pissa(alpha: float) -> None:
    """Theirs moves the base; ours subtracts the start. The functions, and the gradients, are the same."""
    theirs = peft.get_peft_model(
        net()[0].float(), peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=BOTH, init_lora_weights="pissa")
    ).double()
    ours, x = net()
    base = ours(x)
    tuned = dw.attach(ours, dw.PiSSA(on=nn.Linear, rank=3, alpha=alpha, niter=None), seed=0)
    for name, part in tuned.named_parts():
        a, b = factors(layer(theirs, name)).values()
        # Singular vectors have a free sign, the product has none; theirs is rounded to float32 on the way.
        assert torch.allclose(part.b @ part.a, b @ a, atol=1e-6)
        with torch.no_grad():
            for own, start, value in ((part.a, part.a0, a), (part.b, part.b0, b)):
                own.copy_(value)
                start.copy_(value)
            layer(theirs, name).base_layer.weight.copy_(net()[0].get_parameter(name) - part.scale * b @ a)
    assert torch.allclose(ours(x), base) and torch.allclose(theirs(x), base)
    with torch.no_grad():
        for name, part in tuned.named_parts():
            for own, value in factors(layer(theirs, name)).items():
                value.add_(torch.randn_like(value), alpha=0.2)
                part.get_parameter(own).copy_(value)
    assert_equal(ours, tuned, theirs, factors)


MOVED = {
    "pissa": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3}),
    "pissa beside an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3}),
    "pissa with patterns": (
        "llama",
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 7},
         "use_rslora": True},
    ),
    "pissa of Conv1D": ("gpt2", {"target_modules": ["c_attn"]}),
    "olora": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3}),
    "olora with rslora": ("t5", {"target_modules": ["q", "wi_0"], "use_rslora": True}),
    "OLoRA of Conv1D": ("gpt2", {"target_modules": ["attn.c_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED)
@pytest.mark.filterwarnings("ignore")
def test_a_file_whose_start_can_be_made_again_is_read_as_theirs_to_the_last_digit(case: str, tmp_path) -> None:
    """Their base, once moved in float32, is moved by the same factors in float64, where all is compared."""
    name, settings = MOVED[case]
    config = peft.LoraConfig(r=4, init_lora_weights=case.split()[0], **settings)
    theirs, wanted = double_twin(name, config)
    theirs.save_pretrained(tmp_path)
    ours, batch = family(name, torch.float64)
    base = logits(ours, batch)
    tuned = dw.load(ours, tmp_path)
    assert tuned.method.slug == case.split()[0].lower()
    assert_agree(logits(ours, batch), wanted, base, tolerance=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_random_start_is_read_as_the_plain_lora_that_peft_converts_it_to(tmp_path) -> None:
    """As their guide has it: the start is saved first, and both become one file of twice the rank."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa_niter_4")
    theirs, wanted = double_twin("llama", config, start=tmp_path / "start")
    theirs.save_pretrained(tmp_path / "as it is")
    message = refused(family("llama", torch.float64)[0], tmp_path / "as it is")
    assert "'pissa_niter_4'" in message and "random draws" in message and "path_initial_model_for" in message
    with in_double():
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, batch = family("llama", torch.float64)
    base = logits(ours, batch)
    tuned = dw.load(ours, tmp_path / "converted")
    assert tuned.method.slug == "lora" and {part.rank for part in tuned.parts()} == {6}
    assert_agree(logits(ours, batch), wanted, base, tolerance=1e-12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"init_lora_weights": "corda"}, "a start from data"),
        ({"init_lora_weights": "loftq"}, "the base it was trained on"),
        ({"init_lora_weights": "tomorrow"}, "'tomorrow' is not known"),
        ({"init_lora_weights": "pissa", "target_parameters": ["k_proj.weight"]}, "'pissa' with target_parameters"),
        ({"init_lora_weights": "olora"}, "which is quantised; load the base unquantised"),
    ],
)
def test_a_start_that_cannot_be_made_again_is_refused(change, reason: str, tmp_path, monkeypatch) -> None:
    peft.get_peft_model(family("llama")[0], peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if change == {"init_lora_weights": "olora"}:
        monkeypatch.setattr(Weight, "quantised", True)
    assert reason in refused(family("llama")[0], tmp_path)


STARTED = {
    "pissa": (dw.PiSSA(rank=3, alpha=5.0), 10),
    "pissa with other ranks": (dw.PiSSA(rank=3, overrides={"q_proj": {"rank": 2}}), 6),
    "olora": (dw.OLoRA(rank=3, alpha=5.0), 10),
    "nlora": (dw.NLoRA(rank=3, alpha=5.0, subtract_init=True), 10),
    "nlora with the inverse": (dw.NLoRA(rank=3, subtract_init=True, nystrom="pinv"), 6),
}


@pytest.mark.parametrize("case", STARTED)
def test_a_subtracted_start_is_written_as_a_plain_lora_of_twice_the_rank(case: str, tmp_path) -> None:
    method, alpha = STARTED[case]
    model, batch = family("llama", torch.float64)
    base = logits(model, batch)
    move(dw.attach(model, method, seed=0).parameters())
    dw.save(model, tmp_path, format="peft")
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.init_lora_weights, config.use_rslora) == (6, alpha, True, False)
    twin, _ = family("llama", torch.float64)
    with in_double():
        theirs = peft.PeftModel.from_pretrained(twin, str(tmp_path))
    assert_agree(logits(theirs, batch), logits(model, batch), base, tolerance=1e-12)


def test_vera() -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return {"lambda_b": layer.vera_lambda_b["default"], "lambda_d": layer.vera_lambda_d["default"]}

    method = dw.VeRA(on=nn.Linear, rank=4, d_initial=0.1, seed=11)
    config = peft.VeraConfig(r=4, target_modules=BOTH, projection_prng_key=11, d_initial=0.1)
    ours, tuned, theirs = twins(method, config, translate)
    for part in tuned.parts():
        # The same seed is the same pair; theirs was drawn in float64 here, so both take our numbers.
        part.pair.a.copy_(layer(theirs, "first").vera_A["default"])
        part.pair.b.copy_(layer(theirs, "first").vera_B["default"])
    assert_equal(ours, tuned, theirs, translate)


def test_vera_draws_the_same_pair_from_the_same_seed() -> None:
    model, _ = net()
    theirs = peft.get_peft_model(model.float(), peft.VeraConfig(r=4, target_modules=BOTH, projection_prng_key=11))
    pair = RandomPair(4, 12, 8, seed=11)
    assert torch.equal(pair.a, layer(theirs, "first").vera_A["default"])
    assert torch.equal(pair.b, layer(theirs, "first").vera_B["default"])


def test_olora() -> None:
    """As PiSSA: theirs moves the base by the same product that ours subtracts."""
    ours, x = net()
    base = ours(x)
    tuned = dw.attach(ours, dw.OLoRA(on=nn.Linear, rank=3, alpha=5.0), seed=0)
    theirs = peft.get_peft_model(
        net()[0].float(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=BOTH, init_lora_weights="olora")
    ).double()
    assert torch.allclose(theirs(x), base, atol=1e-5) and torch.allclose(ours(x), base)
    for name, part in tuned.named_parts():
        a, b = factors(layer(theirs, name)).values()
        signs = (part.b * b).sum(0).sign()
        assert torch.allclose(part.b, signs * b, atol=1e-5)
        assert torch.allclose(part.a, signs[:, None] * a, atol=1e-5)


def miss(layer) -> dict[str, torch.Tensor]:
    return {"d": layer.miss_block["default"]}


@pytest.mark.parametrize("rank", [4, 5])
def test_miss(rank: int) -> None:
    method = dw.MiSS(on=nn.Linear, rank=rank)
    assert_equal(*twins(method, peft.MissConfig(r=rank, target_modules=BOTH), miss), miss)


def test_miss_mini() -> None:
    method = dw.MiSS(on=nn.Linear, rank=4, mini=2)
    config = peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=BOTH)
    assert_equal(*twins(method, config, miss), miss)


def test_bone_bat() -> None:
    method = dw.BoneBAT(on=nn.Linear, rank=2)
    config = peft.MissConfig(r=2, init_weights="bat", target_modules=BOTH)
    assert_equal(*twins(method, config, miss), miss)


@pytest.mark.parametrize("rank", [3, 4])
def test_randlora(rank: int) -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return {"lam": layer.randlora_lambda["default"], "gamma": layer.randlora_gamma["default"]}

    method = dw.RandLoRA(on=nn.Linear, rank=rank, alpha=10.0)
    config = peft.RandLoraConfig(r=rank, randlora_alpha=10, target_modules=BOTH)
    ours, tuned, theirs = twins(method, config, translate)
    assert_equal(ours, tuned, theirs, translate)


@pytest.mark.parametrize("sparsity", [{}, {"sparse": True}, {"very_sparse": True}])
def test_randlora_draws_the_same_bases_from_the_same_seed(sparsity: dict[str, bool]) -> None:
    model, _ = net()
    theirs = peft.get_peft_model(
        model, peft.RandLoraConfig(r=3, target_modules=BOTH, projection_prng_key=7, **sparsity)
    )
    sparse = {"sparse": "sparse", "very_sparse": "very"}.get(next(iter(sparsity), ""), "no")
    part = next(dw.attach(net()[0], dw.RandLoRA(on=nn.Linear, rank=3, seed=7, sparse=sparse), seed=0).parts())
    assert torch.equal(part.bases.a.unsqueeze(1), layer(theirs, "first").randlora_A["default"].to(part.bases.a))
    assert torch.equal(part.bases.b, layer(theirs, "first").randlora_B["default"].to(part.bases.b))


def test_randlora_starts_like_theirs() -> None:
    theirs = peft.get_peft_model(net()[0], peft.RandLoraConfig(r=3, target_modules=BOTH))
    tuned = dw.attach(net()[0], dw.RandLoRA(on=nn.Linear, rank=3), seed=0)
    for name, part in tuned.named_parts():
        assert torch.allclose(part.gamma, layer(theirs, name).randlora_gamma["default"].double())
        assert part.lam.shape == layer(theirs, name).randlora_lambda["default"].shape
