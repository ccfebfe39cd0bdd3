"""What all methods that move ranks between layers promise: a compact end, state for what survives, any interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.triangular import Triangular
from deltaworks.core.operators.triplet import compact
from deltaworks.core.ranks import triplets
from tests.families import FAMILIES
from tests.methods.resuming import trained
from tests.methods.toys import attach, net, nudge, steps

METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"init_rank": 4, "target_rank": 2, "t_init": 2, "t_final": 4},
    "lora_squared": {"init_rank": 4, "target_rank": 2, "width": 3, "t_init": 2, "t_final": 4},
    "dora_dynamic": {"init_rank": 4, "target_rank": 2, "interval": 2},
    "sora": {"rank": 4, "xi": 0.08},
    "increlora": {"target_rank": 3, "top": 4, "interval": 2},
    "triadaptlora": {"reference": 3, "interval": 2},
}
every = pytest.mark.parametrize("slug", METHODS)


def ranks(tuned: dw.Tuned) -> list[int]:
    """The rank of every part as it is stored."""
    found = {name: l.shape[-1] for name, _, l, _ in triplets(tuned)}
    found |= {name: part.a.shape[-2] for name, part in tuned.of_kind(Triangular)}
    return [found[name] for name, _ in tuned.named_parts()]


@pytest.mark.parametrize(
    ("slug", "family", "stops"),
    # The two that grow are interrupted at more steps where their sheets are tested.
    [(slug, "llama", (3, 7)) for slug in list(METHODS)[:4]] + [("adalora", "mixtral", (4,))],
)
def test_it_resumes_bit_for_bit_with_its_record(slug: str, family: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    method = dw.method(slug, **METHODS[slug])
    whole, history, _ = trained(method, tmp_path, family, steps=9)
    assert history["ranks"][-1][0] == 9
    for stop in stops:
        resumed, again, _ = trained(method, tmp_path, family, steps=9, stop=stop)
        assert list(whole) == list(resumed) and history == again, stop
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), stop


@every
def test_what_is_saved_has_the_final_ranks_only_and_is_the_trained_function(slug: str, tmp_path: Path) -> None:
    model, batch = FAMILIES["llama"]()
    tuned = dw.attach(model, dw.method(slug, **METHODS[slug]), seed=0)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(2e-2))
    rules = tuned.run(30, optimizer=optimizer)
    rules.emit("attached")
    for _ in range(30):
        optimizer.zero_grad()
        rules.emit("step_begin")
        model(**batch).loss.backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
    with torch.no_grad():
        expected = model(**batch).logits
    rules.emit("finished")
    last = dict(rules.run.history["ranks"][-1][1])
    assert rules.run.history["ranks"][-1][0] == 30 and len({*last.values()}) > 1, "layers end with different ranks"
    assert ranks(tuned) == list(last.values()), "what is stored is what is recorded"
    with torch.no_grad():
        tolerance = 1e-5 if slug != "increlora" else 1e-4  # what was in reserve had a tiny weight
        assert torch.allclose(model(**batch).logits, expected, atol=tolerance)
        expected = model(**batch).logits
    dw.save(model, tmp_path / "adapter")
    fresh, _ = FAMILIES["llama"]()
    loaded = dw.load(fresh, tmp_path / "adapter")
    with torch.no_grad():  # as what is expected was read; under gradients layers share products, which rounds otherwise
        assert ranks(loaded) == ranks(tuned) and torch.equal(fresh(**batch).logits, expected)
    dw.merge(fresh)
    assert torch.allclose(fresh(**batch).logits, expected, atol=1e-4)


@pytest.mark.parametrize("slug", ["adalora", "lora_squared"])
def test_a_layer_may_end_with_nothing(slug: str, tmp_path: Path) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.methods()[slug], **METHODS[slug])
    nudge(tuned)
    (_, p, l, q), _ = triplets(tuned)
    with torch.no_grad():
        l.zero_()
    expected = model(x).detach()
    compact(p, l, q)
    assert ranks(tuned) == [0, 4] and torch.allclose(model(x), expected)
    model(x).sum().backward()
    dw.save(model, tmp_path / "adapter")
    fresh, _ = net(12, 8, 6)
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x))


@every
def test_the_optimizer_remembers_exactly_what_is_left(slug: str) -> None:
    model, x = net(12, 8, 6)
    tuned = attach(model, dw.methods()[slug], **METHODS[slug])
    held: list[torch.optim.Optimizer] = []
    made = torch.optim.AdamW

    class Kept(made):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            held.append(self)

    torch.optim.AdamW = Kept  # type: ignore[misc]
    try:
        for _ in steps(model, x, tuned, 14):
            for parameter in tuned.parameters():
                state = held[0].state.get(parameter)
                if state:
                    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    finally:
        torch.optim.AdamW = made  # type: ignore[misc]
    if slug != "increlora":  # whose parts are exchanged for simpler ones in the end
        for parameter in tuned.parameters():
            assert isinstance(parameter, nn.Parameter)
            assert held[0].state[parameter]["exp_avg"].shape == parameter.shape
