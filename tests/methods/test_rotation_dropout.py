"""OFT and BOFT: some blocks turn nothing in training."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part

FORMS = {
    "oft": {"block": 3},
    "exact": {"block": 3, "terms": None},
    "boft": {"block": 2},
    "butterfly": {"block": 2, "stages": 2},
}


def made(form: str, dropout: float):
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.BOFT if form in ("boft", "butterfly") else dw.OFT, dropout=dropout, **FORMS[form])
    nudge(tuned, 0.5)
    return model.train(), x, tuned


@pytest.mark.parametrize("form", ["oft", "exact", "boft"])
def test_a_share_of_the_blocks_turns_nothing(form: str) -> None:
    model, _, tuned = made(form, 0.5)
    delta, weight, bias = part(tuned), model.first.weight.detach(), model.first.bias
    side = FORMS[form]["block"]
    eye = torch.eye(12, dtype=torch.float64)
    scale = delta.s if form == "boft" else 1.0
    with torch.no_grad():
        seen = set()
        for _ in range(12):
            y = (model.first(eye) - bias) / scale
            plain = eye @ weight.T
            whole = (model.eval().first(eye) - bias) / scale
            model.train()
            kept = []
            for block in range(12 // side):
                rows = slice(block * side, (block + 1) * side)
                still = torch.allclose(y[rows], plain[rows])
                assert still or torch.allclose(y[rows], whole[rows])
                kept.append(not still)
            assert sum(kept) == 12 // side - int(0.5 * (12 // side))
            seen.add(tuple(kept))
    assert len(seen) > 1, "drawn anew in every call"


def test_of_a_butterfly_one_stage_loses_blocks() -> None:
    model, x, tuned = made("butterfly", 0.5)
    outputs = []
    for _ in range(8):
        outputs.append(model.first(x).detach())
    assert len({tuple(y.flatten().tolist()) for y in outputs}) > 1
    delta = part(tuned)
    gram = torch.eye(12, dtype=torch.float64)
    r = delta.turned(gram, spare=(torch.arange(6) < 3).view(-1, 1, 1))
    assert torch.allclose(r @ r.T, gram), "it is a rotation still"
    model.eval()
    assert torch.equal(model.first(x), model.first(x))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_blocks_that_turned(form: str) -> None:
    model, x, tuned = made(form, 0.5)
    x.requires_grad_()

    def seeded(*_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return model(x)

    assert torch.autograd.gradcheck(seeded, (x, *tuned.parameters()))


def test_one_shared_rotation_has_no_block_to_drop() -> None:
    with pytest.raises(ValueError, match="one rotation for all blocks has none to drop"):
        dw.OFT(share=True, dropout=0.1)


@pytest.mark.parametrize(("form", "blocks"), [("oft", 4), ("boft", 6), ("butterfly", 6)])
def test_less_than_a_block_is_dropped_as_often_as_its_share_says(form: str, blocks: int) -> None:
    model, x, _ = made(form, 0.1)
    torch.manual_seed(0)
    with torch.no_grad():
        whole = model.eval().first(x)
        model.train()
        changed = sum(not torch.allclose(model.first(x), whole) for _ in range(200))
    assert changed / 200 == pytest.approx(0.1 * blocks, abs=0.1)
