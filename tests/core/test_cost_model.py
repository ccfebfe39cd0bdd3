"""A delta acts beside the weight, through the weight by hand, or through the weight by autograd: all the same, and the
cheaper one where it matters."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import statistics
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
from deltaworks.core.method import Method
from deltaworks.core.operators import effective, low_rank
from deltaworks.core.operators.effective import Built
from deltaworks.core.operators.spectral import Spectral
from deltaworks.core.operators.structured_tiles import StructuredTiles
from deltaworks.core.part import PARTS, Delta
from deltaworks.model.weights import Weight
from tests.conformance.subject import METHODS, adapted
from tests.methods.toys import Net


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


def measured(layer: nn.Linear, delta: Delta, x: Tensor) -> tuple[float, float]:
    """Seconds of a pass beside the weight and of one through it, medians of some that take turns."""
    trained = [p for p in delta.parameters() if p.requires_grad]

    def passing(side: bool) -> float:
        with patch.object(type(delta), "prefers_side", lambda *_: side):
            begin = time.process_time()
            y = layer(x)
            if y.requires_grad:
                torch.autograd.grad(y, [x, *trained], torch.ones_like(y))
            return time.process_time() - begin

    turns = [(passing(True), passing(False)) for _ in range(8)][1:]  # the first is for caches to fill
    beside, through = (statistics.median(times) for times in zip(*turns, strict=True))
    return beside, through


# Of every operator that weighs what its two paths cost: with a few wide tokens side paths are faster, with many narrow
# ones the effective weight. Each case measured at a factor of two or more.
FEW, MANY = (8, 1024), (6000, 96)
BESIDE = [
    dw.LoRA(rank=4),
    dw.LoRA(rank=256),
    dw.LoHa(rank=2),
    dw.VeRA(rank=8),
    dw.OFT(block=16),
    dw.HRA(rank=4),
    dw.C3A(block=256),
    dw.MELoRA(rank=2, n=2),
    dw.Monarch(blocks=8),
    dw.Monarch(blocks=4, rank=64),
    dw.FourierFT(n=4),
    dw.FourierFT(n=128),
    dw.KronA(),
    dw.LoKr(),
    dw.MoRA(),
    dw.MoRA(kind="share"),
    dw.RandLoRA(rank=32),
    dw.SVFit(),
    dw.SVFT(pattern="banded"),
    dw.SURM(),
    dw.SURM(structure="toeplitz"),
    dw.SURM(structure="ldr"),
]
THROUGH = [
    dw.LoRA(rank=96),
    dw.LoHa(rank=24),
    dw.FourierFT(n=900),
    dw.C3A(block=2),
    dw.RandLoRA(rank=8),
    dw.KronA(rows=1, columns=1),
    dw.LoKr(rank=96, factor=2),
    dw.MoRA(rank=32),
    dw.MoRA(rank=32, kind="share"),
    dw.Monarch(blocks=4, rank=24),
    dw.SVFit(),
    dw.SVFT(pattern="banded"),
    dw.SURM(tile=96),
    dw.SURM(structure="toeplitz"),
    dw.SURM(structure="ldr"),
]
# These choose otherwise where nothing is differentiated.
IN_USE = [dw.VeRA(rank=256), dw.RandLoRA(rank=8), dw.SVFit(), dw.SVFT(pattern="banded")]
CASES = [
    *((method, *FEW, True, True) for method in BESIDE),
    *((method, *MANY, True, False) for method in THROUGH),
    *((method, *FEW, False, True) for method in IN_USE),
    *((method, *MANY, False, False) for method in IN_USE),
    # Factors that are as wide as the weight cost more than the weight, even for few tokens.
    (dw.LoHa(rank=24), 8, 256, True, False),
]


def placed(method: Method, width: int) -> tuple[nn.Linear, Delta]:
    """A square layer under a method."""
    model = Net(width, width, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dw.attach(model, dataclasses.replace(method, on="first"), seed=0)
    return next(places(model))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for one another count as work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_choice_is_the_one_that_measures_faster(one_thread: None, case: int) -> None:
    method, tokens, width, training, side = CASES[case]
    layer, delta = placed(method, width)
    x = torch.randn(tokens, width, requires_grad=training)
    with torch.set_grad_enabled(training):
        with patch.object(type(delta), "prefers_side", autospec=True, side_effect=type(delta).prefers_side) as asked:
            layer(x)
        assert delta.prefers_side(*asked.call_args.args[1:]) == side
        beside, through = measured(layer, delta, x)
    assert (beside < through) == side, f"beside {beside * 1e3:.2f} ms, through {through * 1e3:.2f} ms"


def chooser(delta: Delta) -> type:
    """The class whose cost model a delta has."""
    return next(cls for cls in type(delta).__mro__ if "prefers_side" in vars(cls))


def test_every_cost_model_has_clear_cases_of_both_kinds() -> None:
    # What says yes or no without looking at a size does not choose.
    sizes = re.compile(r"\bfan_in\b|\bfan_out\b|\bshape\b|\btransforms_pay\b")
    choosing = {
        cls
        for cls in PARTS.values()
        if "prefers_side" in vars(cls) and sizes.search(inspect.getsource(vars(cls)["prefers_side"]))
    }
    for wanted in (True, False):
        # Sizes aside, a case's operator is the same at a width that all of them divide.
        shown = {chooser(placed(method, 768)[1]) for method, _, _, _, side in CASES if side == wanted}
        assert choosing <= shown, f"side={wanted}: no case for {choosing - shown}"


def test_fourierft_of_a_wide_layer_goes_through_the_weight_for_many_tokens() -> None:
    weight = Weight(nn.Linear(4096, 4096, bias=False, device="meta"))
    delta = Spectral(torch.zeros(1000), torch.arange(1000), 4096, 4096)
    assert delta.prefers_side(1, weight) and not delta.prefers_side(8192, weight)


@pytest.mark.parametrize(("dtype", "side"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_wide_toeplitz_matrix_and_many_tokens(dtype: torch.dtype, side: bool) -> None:
    weight = Weight(nn.Linear(4096, 4096, bias=False, device="meta", dtype=dtype))
    part = StructuredTiles(torch.zeros(1, 1, 1, 4096), torch.zeros(1, 1, 1, 4096), "toeplitz")
    assert part.prefers_side(8192, weight) == side and part.prefers_side(1, weight)
