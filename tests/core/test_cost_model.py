"""A delta acts beside the weight, through the weight by hand, or through the weight by autograd: all the same, and the
cheaper one where it matters."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.graft import graft_of
from deltaworks.core.operators import effective, low_rank
from deltaworks.core.operators.effective import Built
from deltaworks.core.part import Delta
from tests.conformance.subject import METHODS, adapted
from tests.methods.toys import Net

# What the cost model may get wrong on a machine it was not measured on.
CLEAR = 3.0


def places(model: nn.Module) -> Iterator[tuple[nn.Linear, Delta]]:
    """Linear layers with one delta of the weight and nothing else, one of each shape."""
    seen = set()
    for layer in model.modules():
        if not isinstance(layer, nn.Linear):
            continue
        graft = graft_of(layer)
        parts = graft.parts("default") if graft is not None else []
        if len(parts) == 1 and isinstance(parts[0], Delta) and parts[0].site.parameter == "weight":
            shape = tuple(layer.weight.shape)
            if shape not in seen:
                seen.add(shape)
                yield layer, parts[0]


def passed(layer: nn.Linear, delta: Delta, x: Tensor, side: bool, by_hand: bool = True) -> list[Tensor]:
    """Output and gradients by one path."""
    with ExitStack() as changed:
        changed.enter_context(patch.object(type(delta), "prefers_side", lambda *_: side))
        if not by_hand:
            changed.enter_context(patch.object(effective, "_by_hand", lambda *_: None))
        x = x.clone().requires_grad_()
        trained = [p for p in delta.parameters() if p.requires_grad]
        y = layer(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
        found = torch.autograd.grad((y * weights).sum(), [x, *trained], allow_unused=True)
    return [y, *(torch.zeros(()) if gradient is None else gradient for gradient in found)]


@pytest.mark.parametrize("slug", METHODS)
def test_every_path_gives_the_same_output_and_gradients(slug: str) -> None:
    model, _, _ = adapted(slug, dtype=torch.float64)
    model.eval()  # dropout and drawn kinds aside
    for layer, delta in places(model):
        x = torch.randn(2, 7, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        through = passed(layer, delta, x, side=False, by_hand=False)
        others = [passed(layer, delta, x, side=True)] if delta.lean else []
        if isinstance(delta, Built):
            others.append(passed(layer, delta, x, side=False))
        for other in others:
            for one, two in zip(through, other, strict=True):
                assert (one - two).abs().max() <= 1e-9 * max(1, one.abs().max())


@pytest.mark.parametrize("few", [low_rank.FEW, 0], ids=["few", "many"])
@pytest.mark.parametrize("slug", METHODS)
def test_every_path_is_as_near_in_half_precision(monkeypatch: pytest.MonkeyPatch, slug: str, few: int) -> None:
    monkeypatch.setattr(low_rank, "FEW", few)
    model, _, _ = adapted(slug, dtype=torch.bfloat16)
    model.eval()
    exact = copy.deepcopy(model).double()
    for (layer, delta), (twin, same) in zip(places(model), places(exact), strict=True):
        x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(3)).bfloat16()
        wanted = passed(twin, same, x.double(), side=False, by_hand=False)
        paths = [passed(layer, delta, x, side=True)] if delta.lean else []
        paths += [passed(layer, delta, x, side=False, by_hand=by_hand) for by_hand in (False, True)]
        for path in paths:
            for one, two in zip(wanted, path, strict=True):
                assert (one - two.double()).norm() <= 0.06 * one.norm(), (type(delta).__name__, tuple(one.shape))


def measured(layer: nn.Linear, delta: Delta, x: Tensor, side: bool) -> float:
    """Seconds of a forward and backward pass by one path, the least of some."""
    trained = [p for p in delta.parameters() if p.requires_grad]
    best = float("inf")
    with patch.object(type(delta), "prefers_side", lambda *_: side):
        for _ in range(4):
            begin = time.process_time()
            y = layer(x)
            torch.autograd.grad(y, [x, *trained], torch.ones_like(y))
            best = min(best, time.process_time() - begin)
    return best


# Method, tokens, and the weight's two sides; by what is known of the forms, the first half wants the side path.
CASES = [
    (dw.LoRA(rank=4), 8, (768, 768)),
    (dw.LoHa(rank=2), 8, (768, 768)),
    (dw.VeRA(rank=8), 8, (768, 768)),
    (dw.OFT(block=16), 8, (768, 768)),
    (dw.HRA(rank=4), 8, (768, 768)),
    (dw.C3A(block=256), 4, (768, 768)),
    (dw.MELoRA(rank=2, n=2), 8, (768, 768)),
    (dw.Monarch(blocks=8), 8, (768, 768)),
    (dw.FourierFT(n=4), 8, (768, 768)),
    (dw.LoRA(rank=96), 6000, (96, 96)),
    (dw.LoHa(rank=24), 6000, (96, 96)),
    (dw.FourierFT(n=900), 1500, (96, 96)),
    (dw.C3A(block=2), 1500, (96, 96)),
    (dw.RandLoRA(rank=8), 6000, (96, 96)),
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for one another count as work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_choice_is_the_one_that_measures_faster(one_thread: None, case: int) -> None:
    method, tokens, (fan_in, fan_out) = CASES[case]
    model = Net(fan_in, fan_out, fan_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dw.attach(model, method, seed=0)
    layer, delta = next(places(model))
    x = torch.randn(tokens, fan_in, requires_grad=True)
    with patch.object(type(delta), "prefers_side", autospec=True, side_effect=type(delta).prefers_side) as asked:
        layer(x)
    prefers = delta.prefers_side(*asked.call_args.args[1:])
    beside, through = (measured(layer, delta, x, side) for side in (True, False))
    if max(beside, through) > CLEAR * min(beside, through):
        assert prefers == (beside < through), f"beside {beside * 1e3:.2f} ms, through {through * 1e3:.2f} ms"


def test_the_clear_cases_are_clear(one_thread: None) -> None:
    # Without any, the test above would say nothing.
    torch.manual_seed(0)
    model = Net(2048, 2048, 2)
    dw.attach(model, dw.LoRA(rank=4), seed=0)
    layer, delta = next(places(model))
    x = torch.randn(8, 2048, requires_grad=True)
    assert measured(layer, delta, x, False) > CLEAR * measured(layer, delta, x, True)
