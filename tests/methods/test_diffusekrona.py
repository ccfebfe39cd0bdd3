"""DiffuseKronA: a Kronecker product on attention."""

from __future__ import annotations

import torch

import deltaworks as dw
from tests.families import FAMILIES
from tests.methods.toys import attach, net, nudge, part


def test_the_change_is_the_kronecker_product_of_two_full_factors() -> None:
    model, x = net(12, 8, 6)
    weight, bias, base = model.first.weight.detach().clone(), model.first.bias, model(x)
    tuned = attach(model, dw.DiffuseKronA, rows=4, columns=2)
    delta = part(tuned)
    assert torch.equal(model(x), base) and delta.w1.shape == (4, 2) and delta.w2.shape == (2, 6)
    nudge(tuned)
    change = torch.kron(delta.w1, delta.w2)
    assert torch.allclose(model.first(x), x @ (weight + change).T + bias)
    # Its rank is the product of the factors' ranks, above that of any LoRA of as many values (1 here).
    assert torch.linalg.matrix_rank(change) == 4
    rearranged = change.view(4, 2, 2, 6).permute(0, 2, 1, 3).reshape(8, 12)
    assert torch.linalg.matrix_rank(rearranged) == 1


def test_it_acts_on_attention_and_a_is_as_small_as_it_is_high() -> None:
    model, _ = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.DiffuseKronA(), seed=0)
    assert {part.site.role for part in tuned.parts()} == {f"attention.{r}" for r in ("query", "key", "value", "output")}
    spread = torch.cat([part.w1.flatten() * len(part.w1) for part in tuned.parts()]).std()
    assert 0.9 < spread < 1.1


def test_cross_attention_is_named_by_itself() -> None:
    def reached(**settings) -> set[str]:
        tuned = dw.attach(FAMILIES["t5"]()[0], dw.DiffuseKronA(**settings), seed=0)
        return {part.site.role.partition(".")[0] for part in tuned.parts()}

    assert reached() == {"attention"}
    assert reached(on=["attention", "cross_attention"]) == {"attention", "cross_attention"}
