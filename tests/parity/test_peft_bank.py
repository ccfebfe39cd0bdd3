"""VB-LoRA computes what `peft` computes, its bank's gradient included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from tests.families import FAMILIES
from tests.parity.twins import assert_equal, layer, twins

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("top", [2, 3])
def test_vb_lora(top: int) -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        logits = {"a": layer.vblora_logits_A["default"], "b": layer.vblora_logits_B["default"]}
        return logits | {"bank.vectors": layer.vblora_vector_bank["default"]}

    method = dw.VBLoRA(on=nn.Linear, rank=3, vectors=10, length=2, top=top)
    config = peft.VBLoRAConfig(r=3, num_vectors=10, vector_length=2, topk=top, target_modules=["first", "second"])
    ours, tuned, theirs = twins(method, config, translate)
    assert len(tuned.parameters()) == sum(p.requires_grad for p in theirs.parameters())
    assert_equal(ours, tuned, theirs, translate)


def test_vb_lora_starts_like_theirs() -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    config = peft.VBLoRAConfig(r=4, num_vectors=90, vector_length=16, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(256, 256)), config)
    part = next(dw.attach(model, dw.VBLoRA(on=nn.Linear, vectors=90, length=16), seed=0).parts())
    other = layer(theirs, "0")
    assert part.a.shape == other.vblora_logits_A["default"].shape and abs(part.a.std() - 0.1) < 0.005
    assert abs(other.vblora_logits_A["default"].std() - 0.1) < 0.005
    for bank in (part.bank.vectors, other.vblora_vector_bank["default"]):
        assert 0.019 < bank.abs().max() <= 0.02


@pytest.mark.parametrize("compact", [False, True])
def test_files_in_both_directions(compact: bool, tmp_path) -> None:
    model, batch = FAMILIES["llama"]()
    on = ["attention.query", "mlp.down"]
    tuned = dw.attach(model, dw.VBLoRA(on=on, rank=2, vectors=12, length=8, keep_logits=not compact), seed=0)
    with torch.no_grad():
        next(tuned.parts()).bank.vectors.mul_(20)
    tuned.run(1).emit("finished")
    expected = model(**batch).logits
    dw.save(model, tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(FAMILIES["llama"]()[0], tmp_path / "ours").eval()
    assert torch.allclose(theirs(**batch).logits, expected, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh, _ = FAMILIES["llama"]()
    back = dw.load(fresh, tmp_path / "theirs")
    assert torch.allclose(fresh(**batch).logits, expected, atol=1e-5)
    assert bool(back.parameters()) != compact
    assert (back.method.rank, back.method.vectors, back.method.length, back.method.top) == (2, 12, 8, 2)
