"""Every method on every kind of base: decoders, encoder, encoder-decoder, vision, experts, state space."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.conformance.subject import KINDS, METHODS, attach, build, loss, nudge, output


def outcome(slug: str, family: str):
    """The adapted model with its parts, or the reason it was refused."""
    model, batch = build(family)
    base = output(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        return model, batch, base, before, attach(model, slug, family)
    except ValueError as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) > 20, refusal
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(output(model, batch), base), "a refused method must leave the model as it was"
        return None


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("slug", METHODS)
def test_it_starts_trains_merges_and_leaves(slug: str, family: str, tmp_path) -> None:
    made = outcome(slug, family)
    if made is None:
        assert family in dw.methods()[slug].refuses, f"{slug} refuses {family} without saying so on its page"
        return
    assert family not in dw.methods()[slug].refuses
    model, batch, base, before, tuned = made
    with torch.no_grad():
        start = output(model, batch)
    same = bool((start - base).abs().max() <= 2e-5 * base.abs().max())
    assert same or not tuned.method.exact_at_start
    nudge(tuned)
    loss(model, batch).backward()
    reached = [name for name, p in tuned.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert reached
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)
    model.zero_grad()
    with torch.no_grad():
        beside = output(model, batch)
        dw.save(model, tmp_path / "adapter")
        fresh, _ = build(family)
        dw.load(fresh, tmp_path / "adapter")
        assert torch.equal(output(fresh, batch), beside)
        if tuned.method.mergeable:
            dw.merge(model, untie=True)
            assert (output(model, batch) - beside).abs().max() <= 2e-5 * beside.abs().max()
    dw.detach(model)
    assert torch.equal(output(model, batch), base)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
