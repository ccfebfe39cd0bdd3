"""What is exported for servers is a plain LoRA, as close to the change as its rank allows, and keeps vLLM's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deltaworks as dw
from deltaworks.adapters import check_vllm, export
from deltaworks.adapters.recompress import of_matrix, truncated
from tests.adapters.adapted import adapted
from tests.families import FAMILIES


def _low_rank(rank: int, out: int = 20, into: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(out, rank), make(rank, into)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_the_best_there_is_and_knows_its_error(rank: int) -> None:
    b, a = _low_rank(6)
    pair = truncated(b, a, rank)
    u, s, vh = torch.linalg.svd(b @ a)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    torch.testing.assert_close(pair.b @ pair.a, best)
    assert pair.error == pytest.approx(float(torch.linalg.matrix_norm(b @ a - best)), abs=1e-9)
    assert pair.norm == pytest.approx(float(torch.linalg.matrix_norm(b @ a)))
    for gram in (pair.b.T @ pair.b, pair.a @ pair.a.T):
        torch.testing.assert_close(gram, torch.diag(s[:rank]))


def test_factors_wider_than_the_matrix_fall_back_to_the_matrix() -> None:
    b, a = _low_rank(30)
    torch.testing.assert_close(truncated(b, a, 4).a, of_matrix(b @ a, 4).a)


EXACT: dict[str, tuple[str, Any]] = {
    "two ranks and scales": ("llama", dw.LoRA(rank=4, rslora=True, overrides={"q_proj": {"rank": 2, "alpha": 5.0}})),
    "a start that is subtracted": ("llama", dw.PiSSA(rank=4)),
    "parts of fused layers": ("phi3", dw.LoRA(rank=4, on=["attention.query", "attention.value"])),
    "an embedding": ("llama", dw.LoRA(rank=4, on=["embedding", "attention"])),
    "triplets": ("llama", dw.AdaLoRA()),
}


@pytest.mark.parametrize("case", EXACT)
def test_changes_with_factors_are_exported_without_loss(case: str, tmp_path: Path) -> None:
    family, method = EXACT[case]
    model, batch = adapted(family, method)
    dw.save(model, tmp_path, format="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and not config["rank_pattern"] and not config["use_rslora"]
    assert {
        value.shape[0] for name, value in load_file(tmp_path / "adapter_model.safetensors").items() if "_A" in name
    } == {config["r"]}
    fresh, _ = FAMILIES[family]()
    dw.load(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    assert check_vllm(tmp_path) == []


@pytest.mark.parametrize(
    "method", [dw.DoRA(rank=4), dw.C3A(), dw.IA3(), dw.FourierFT(n=20, alpha=100.0)], ids=lambda m: m.slug
)
def test_any_change_of_weights_is_approximated_and_the_error_is_the_real_one(method: Any, tmp_path: Path) -> None:
    model, batch = adapted("llama", method)
    tuned = dw.tuned(model)
    with pytest.raises(ValueError, match="give the rank"):
        export(tuned, tmp_path)
    full = export(tuned, tmp_path, rank=48)
    assert full.error < 1e-6
    fresh, _ = FAMILIES["llama"]()
    dw.load(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    small = export(tuned, tmp_path, rank=4)
    assert small.rank == 4 and small.broken == [] and 0 < small.error < 1
    base, approximated = FAMILIES["llama"]()[0], FAMILIES["llama"]()[0]
    dw.load(approximated, tmp_path)
    dw.merge(approximated)
    dw.merge(model)
    for layer, error in small.errors.items():
        start, real, found = (m.get_submodule(layer).weight for m in (base, model, approximated))
        norm = torch.linalg.matrix_norm
        assert float((norm(real - found) / norm(real - start)).detach()) == pytest.approx(error, rel=1e-3, abs=1e-5)


def test_tensors_have_the_bases_dtype_or_the_one_asked_for(tmp_path: Path) -> None:
    model, _ = adapted("llama", dw.LoRA(rank=2))
    export(dw.tuned(model), tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    export(dw.tuned(model.half()), tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float16}


REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "modules on activations": ("bert", dw.Houlsby(), {}, "runs beside the base"),
    "a scaled bias": ("bert", dw.IA3(), {}, "changes a bias"),
    "a bias": ("bert", dw.BitFit(), {}, "trained itself"),
    "a head": ("bert_classification", dw.LoRA(rank=2), {"also": "head"}, "trained itself"),
    "experts": ("mixtral", dw.LoRA(rank=2), {}, "experts fused"),
    "convolutions": ("cnn", dw.LoRA(rank=2, on=[nn.Conv2d]), {}, "not at a linear layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_lora_can_express_is_refused_by_name(case: str, tmp_path: Path) -> None:
    family, method, more, reason = REFUSED[case]
    model, _ = adapted(family, method, **more)
    with pytest.raises(ValueError, match=f"{method.slug} cannot be exported: .*{reason}"):
        export(dw.tuned(model), tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_every_broken_rule_is_listed(tmp_path: Path) -> None:
    model, _ = adapted("bert", dw.DoRA(rank=20, overrides={"query": {"rank": 2}}), also="norm.embedding")
    dw.save(model, tmp_path, format="peft")
    broken = "\n".join(check_vllm(tmp_path))
    for rule in (
        "use_dora=True",
        "modules_to_save=",
        "rank_pattern: older",
        "r=20: above max_lora_rank=16",
        "query is no layer",
    ):
        assert rule in broken
    assert "max_lora_rank" not in "\n".join(check_vllm(tmp_path, max_rank=32))
    dw.save(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="PEFT's format"):
        check_vllm(tmp_path)
