"""EVA and LoRA-GA start where `peft` starts, as far as both say the same; their files are LoRA files to `peft`."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.statistics import second_moments
from tests.adapters.adapted import assert_agree, move, refused
from tests.families import FAMILIES
from tests.parity.moved import in_double, move_exactly

peft = pytest.importorskip("peft")
WHERE = ["down_proj", "q_proj"]


def data() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model, _ = FAMILIES["llama"]()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (8, 32), generator=generator) for _ in range(3)]
    return model, [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]


def test_eva_finds_the_directions_that_theirs_converges_to() -> None:
    model, batches = data()
    tuned = dw.attach(model, dw.EVA(on=["attention.query", "mlp.down"], rank=3, rho=1.0), data=batches)
    twin, _ = data()
    config = peft.LoraConfig(
        r=3, target_modules=WHERE, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, use_label_mask=False)
    )
    theirs = peft.get_peft_model(twin, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    for part in tuned.parts():
        other = theirs.get_submodule(f"base_model.model.{part.site.path}").lora_A["default"].weight
        _, moment = next(second_moments(model, [part.site.path], batches))
        # Theirs stops when directions move little from batch to batch; ours are those of most variance.
        ours, others = (torch.trace(a.double() @ moment.covariance @ a.double().T) for a in (part.a, other))
        assert part.a.shape == other.shape and 0.97 * ours < others <= ours * (1 + 1e-6)


def test_lora_ga_takes_the_same_singular_vectors() -> None:
    """Theirs also multiplies B by the singular values of the gradient; ours follows the official code."""
    model, batches = data()
    tuned = dw.attach(model, dw.LoRAGA(on=["attention.query", "mlp.down"], rank=2), data=batches, seed=0)
    twin, _ = data()
    config = peft.LoraConfig(
        r=2, target_modules=WHERE, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(direction="ArB2r")
    )

    def step() -> None:
        for batch in batches:
            (twin(**batch).loss / len(batches)).backward()

    peft.tuners.lora.preprocess_loraga(twin, config, step)
    theirs = peft.get_peft_model(twin, config)
    for part in tuned.parts():
        layer = theirs.get_submodule(f"base_model.model.{part.site.path}")
        for ours, other in ((part.a, layer.lora_A["default"].weight), (part.b.T, layer.lora_B["default"].weight.T)):
            cosines = torch.linalg.svdvals(
                nn.functional.normalize(ours, dim=1) @ nn.functional.normalize(other, dim=1).T
            )
            assert cosines.min() > 0.99


@pytest.mark.filterwarnings("ignore")
def test_an_eva_file_with_its_ranks_is_read(tmp_path) -> None:
    model, batches = data()
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=WHERE, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, use_label_mask=False),
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    move([value for value in theirs.double().eval().parameters() if value.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = data()[0].double()
    base = ours(**batches[0]).logits
    tuned = dw.load(ours, tmp_path)
    ranks = [part.rank for part in tuned.parts()]
    assert sum(ranks) == 3 * 4 and len(set(ranks)) > 1, "the ranks went where the variance is"
    assert_agree(ours(**batches[0]).logits, theirs(**batches[0]).logits, base, tolerance=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_lora_ga_file_is_read_once_it_is_converted(tmp_path) -> None:
    model, batches = data()
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=WHERE, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    peft.tuners.lora.preprocess_loraga(model, config, lambda: model(**batches[0]).loss.backward())
    theirs = peft.get_peft_model(model, config).double().eval()
    move_exactly(theirs, data()[0].double())
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "lora_ga"
    move([value for value in theirs.parameters() if value.requires_grad])
    theirs.save_pretrained(tmp_path / "as it is")
    message = refused(data()[0], tmp_path / "as it is")
    assert "start from data" in message and "path_initial_model_for_weight_conversion" in message
    with in_double():
        theirs.save_pretrained(
            tmp_path / "made plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    ours = data()[0].double()
    base = ours(**batches[0]).logits
    assert {part.rank for part in dw.load(ours, tmp_path / "made plain").parts()} == {4}
    assert_agree(ours(**batches[0]).logits, theirs(**batches[0]).logits, base, tolerance=1e-12)


@pytest.mark.parametrize("method", [dw.EVA, dw.LoRAGA, dw.ColaChain])
def test_their_peft_reads_our_files(method: type, tmp_path) -> None:
    model, batches = data()
    tuned = dw.attach(model.double(), method(on=["attention.query", "mlp.down"], rank=3), data=batches, seed=0)
    move(tuned.parameters())
    dw.save(model, tmp_path, format="peft")
    twin = data()[0].double()
    base = twin(**batches[0]).logits
    with in_double():
        theirs = peft.PeftModel.from_pretrained(twin, str(tmp_path)).eval()
    assert_agree(theirs(**batches[0]).logits, model(**batches[0]).logits, base, tolerance=1e-12)
    if method is dw.LoRAGA:  # alpha / sqrt(r), and twice the rank
        config = theirs.peft_config["default"]
        assert (config.r, config.lora_alpha, config.use_rslora) == (6, pytest.approx(2 * 3**0.5 * 16), False)
