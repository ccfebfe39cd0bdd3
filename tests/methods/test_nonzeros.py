"""RoSA, DSEE and SPP: gradients and optimizer state are as large as what trains, and nothing dense is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deltaworks as dw
from deltaworks.core.operators.low_rank_sparse import LowRankSparse
from deltaworks.core.operators.multiplied import Multiplied
from deltaworks.core.operators.pruned_weight import PrunedLowRankSparse
from deltaworks.core.part import Delta
from tests.methods.toys import saved_shapes

OUT, IN, TOKENS, RANK = 48, 80, 20, 2
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "matmul", "einsum", "linear")


class Products(TorchDispatchMode):
    """Shapes of the results of all matrix products, and of the largest new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.shapes += [tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


def sparse(kind: type[LowRankSparse], entries: int) -> Delta:
    torch.manual_seed(0)
    index = torch.randperm(OUT * IN)[:entries].sort().values
    delta = kind(torch.randn(RANK, IN), torch.randn(OUT, RANK), torch.randn(entries), index)
    if isinstance(delta, PrunedLowRankSparse):
        delta.prune(torch.rand(OUT, IN) > 0.5)
    return delta


def multiplied() -> Delta:
    return Multiplied(torch.randn(RANK, IN), torch.randn(OUT), scale=2.0)


MADE = {
    "rosa": lambda: sparse(LowRankSparse, 40),
    "dsee": lambda: sparse(PrunedLowRankSparse, 40),
    "spp": multiplied,
}


def installed(delta: Delta) -> tuple[nn.Linear, Tensor, dw.Tuned]:
    """A layer with a delta, and an input of which the gradient is wanted."""
    from deltaworks.core.attach import install
    from deltaworks.core.method import Placed
    from deltaworks.model.anatomy import Site

    model = nn.Sequential(nn.Linear(IN, OUT))
    tuned = install(model, dw.LoRA(), [Placed(Site("0", None, "linear"), delta, "weight")], {})
    return model[0], torch.randn(TOKENS, IN, requires_grad=True), tuned  # type: ignore[return-value]


def held(tuned: dw.Tuned, layer: nn.Linear, x: Tensor) -> int:
    """Bytes of all gradients and all optimizer state after a step, counts of steps left out."""
    optimizer = torch.optim.AdamW(tuned.parameters())
    layer(x).square().sum().backward()
    optimizer.step()
    tensors = [p.grad for p in tuned.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert layer.weight.grad is None and layer.bias.grad is None
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("slug", MADE)
def test_a_trained_value_costs_twelve_bytes_and_no_other_does(slug: str) -> None:
    layer, x, tuned = installed(MADE[slug]())
    values = {"spp": RANK * IN + OUT}.get(slug, RANK * (IN + OUT) + 40)
    assert held(tuned, layer, x) == 12 * values  # a gradient and two moments in float32


@pytest.mark.parametrize("kind", [LowRankSparse, PrunedLowRankSparse])
def test_memory_grows_by_the_entries_that_are_added(kind: type[LowRankSparse]) -> None:
    few, many = (held(tuned, layer, x) for layer, x, tuned in (installed(sparse(kind, n)) for n in (40, 300)))
    assert many - few == 12 * 260 and many < 12 * OUT * IN / 4


@pytest.mark.parametrize("slug", ["rosa", "dsee"])
def test_no_product_gives_a_dense_gradient(slug: str) -> None:
    layer, x, _ = installed(MADE[slug]())
    with Products() as seen:
        layer(x).square().sum().backward()
    assert (TOKENS, OUT) in seen.shapes, "the products are seen"
    assert not [shape for shape in seen.shapes if shape[-2:] in ((OUT, IN), (IN, OUT))]
    seen.shapes.clear()
    dense = nn.Linear(IN, OUT)
    with seen:
        dense(x).square().sum().backward()
    assert (OUT, IN) in seen.shapes, "a dense layer's gradient would be"


@pytest.mark.parametrize("slug", MADE)
def test_nothing_as_large_as_the_weight_is_kept_for_backward(slug: str) -> None:
    layer, x, _ = installed(MADE[slug]())
    kept = saved_shapes(lambda: layer(x))
    assert (OUT, IN) not in kept and (TOKENS, IN) in kept
    # The input (for the low-rank and for the sparse term, one tensor), its projection, values, places, the mask's bits.
    others = RANK * (IN + TOKENS) + OUT + 2 * 40 + OUT * IN // 8
    assert sum(torch.Size(shape).numel() for shape in kept) <= 2 * TOKENS * IN + others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", ["2:4", "any"])
def test_spp_keeps_the_pattern_exactly_also_in_half_precision(dtype: torch.dtype, pattern: str) -> None:
    torch.manual_seed(0)
    layer, _, tuned = installed(multiplied())
    layer.to(dtype)
    with torch.no_grad():
        scores = layer.weight.float().abs().view(-1, 4)
        two = torch.zeros_like(scores).scatter(1, scores.topk(2, dim=1).indices, 1).view(OUT, IN)
        layer.weight.mul_(two if pattern == "2:4" else torch.rand(OUT, IN) > 0.6)
        next(tuned.parts()).double().float().b.normal_()
    before = layer.weight != 0
    expected = layer.weight.detach().clone()
    dw.bake(tuned.model)
    after = layer.weight != 0
    assert torch.equal(after, before) and not torch.equal(layer.weight, expected)
    if pattern == "2:4":
        assert (after.view(-1, 4).sum(1) == 2).all()
