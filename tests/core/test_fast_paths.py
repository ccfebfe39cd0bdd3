"""What the hand-written products keep for backward, and that the orders they are computed in change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.operators import decomposed, low_rank, products, rotation
from deltaworks.core.operators.products import in_rows, over_batch, over_rows
from tests.methods.toys import attach, net, nudge, part, saved_shapes

COSTLY = {
    "fourierft": (dw.FourierFT, {"n": 30}),
    "randlora": (dw.RandLoRA, {"rank": 2}),
    "svfit": (dw.SVFit, {}),
    "svft": (dw.SVFT, {"pattern": "banded"}),
}


class Written(nn.Module):
    """A linear layer whose output the model writes to, or adds to without writing."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.in_place = nn.Linear(12, 8, bias=False), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.in_place:
            y += x[..., :8]
            return y
        return y + x[..., :8]


def gained(method, in_place: bool, zero: bool, seed: int = 0, **settings) -> tuple[nn.Module, Tensor, dw.Tuned]:
    torch.manual_seed(seed)
    model, x = Written(in_place).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    tuned = attach(model, method, **settings)
    nudge(tuned, 0.3)
    if zero:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith(("magnitude", ".s")))[2] = 0
    return model, x, tuned


def gradients(model: nn.Module, x: Tensor, tuned: dw.Tuned) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (model(x).square() * torch.arange(8)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in tuned.parameters())]


@pytest.mark.parametrize("zero", [False, True], ids=["gains", "a gain of zero"])
@pytest.mark.parametrize("in_place", [False, True], ids=["read", "written to"])
@pytest.mark.parametrize("method", [dw.DoRA, dw.BOFT])
def test_gradients_of_gains_from_the_kept_output(monkeypatch, method, in_place: bool, zero: bool) -> None:
    settings = {"rank": 2} if method is dw.DoRA else {"block": 4}
    found = gradients(*gained(method, in_place, zero, **settings))
    for module in (decomposed, rotation):
        monkeypatch.setattr(module, "plain", lambda *_: False)
    expected = gradients(*gained(method, False, zero, **settings))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


STRIPPED = {
    "oft": (dw.OFT, {"block": 4}),
    "oft, one block for all": (dw.OFT, {"block": 4, "share": True}),
    "boft": (dw.BOFT, {"block": 4}),
    "dora": (dw.DoRA, {"rank": 2}),
}


@pytest.mark.parametrize("name", STRIPPED)
def test_rows_go_through_a_few_at_a_time(monkeypatch, name: str) -> None:
    method, settings = STRIPPED[name]
    model, x, tuned = gained(method, False, False, **settings)
    whole = [model(x), *gradients(model, x, tuned)]
    monkeypatch.setattr(products, "SOME", 3)
    assert len(products.strips(x.flatten(0, 1))) == 4
    parts = [model(x), *gradients(model, x, tuned)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", STRIPPED)
def test_a_batch_of_nothing(name: str) -> None:
    method, settings = STRIPPED[name]
    model, x, tuned = gained(method, False, False, **settings)
    found = [tensor for tensor in gradients(model, x[:0], tuned) if tensor is not None]
    assert found[0].shape == (0, 5, 12) and len(found) > 1 and not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("method", [dw.DoRA, dw.BOFT])
def test_an_output_that_is_kept_anyway_takes_no_memory_twice(method) -> None:
    model, x, _ = gained(method, False, False, **({"rank": 2} if method is dw.DoRA else {"block": 4}))
    places: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        places[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = torch.sigmoid(model.first(x.requires_grad_()))  # keeps its result, not the output it reads
        assert sum(shape[-1] == 8 and len(shape) == 3 for shape in places.values()) == 2
        places.clear()
        nn.functional.silu(model.first(x))  # keeps what it reads
        assert sum(shape[-1] == 8 and len(shape) == 3 for shape in places.values()) == 1
    assert kept.shape == (2, 5, 8)


@pytest.mark.parametrize("slug", COSTLY)
def test_a_costly_weight_is_kept_where_the_input_is_twice_as_large(slug: str) -> None:
    method, settings = COSTLY[slug]
    model, x = net(16, 16, 6)
    tuned = attach(model, method, **settings)
    nudge(tuned)
    delta, weight = part(tuned), model.first.weight
    delta.prefers_side = lambda *_: False
    for repeat, kept in ((1, False), (4, True)):
        many = x.repeat(repeat, 1, 1).requires_grad_()
        assert ((16, 16) in saved_shapes(lambda many=many: model.first(many))) == kept
        found = torch.autograd.grad(model.first(many).square().sum(), [many, *delta.parameters()])
        whole = nn.functional.linear(many, delta.fold(weight.detach()), model.first.bias)
        expected = torch.autograd.grad(whole.square().sum(), [many, *delta.parameters()])
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected, strict=True))
    assert (16, 16) not in saved_shapes(lambda: model.first(many.detach()))  # whose gradient nobody wants


@pytest.mark.parametrize("rows", [1536, 1601])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_over_rows_whatever_the_order(rows: int, dtype: torch.dtype) -> None:
    wide = torch.randn(rows, 300).to(dtype)
    for a in (wide, wide[:, 20:280]):
        b = torch.randn(rows, 1024).to(dtype)
        expected = a.double().T @ b.double()
        assert torch.allclose(over_rows(a, b).double(), expected, rtol=1e-2, atol=1e-1)
        assert over_rows(a, b).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 40])
def test_products_over_a_batch_by_one_product_and_by_many(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(600, 9, width).to(dtype), torch.randn(600, 7, width).to(dtype)
    expected = torch.einsum("tnk,tmk->nm", a.double(), b.double())
    error = (over_batch(a, b).double() - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-12)
    assert over_batch(a, b).dtype == dtype


def test_a_transpose_is_put_into_the_order_of_its_rows() -> None:
    matrix = torch.randn(700, 523).to(torch.bfloat16)
    assert torch.equal(in_rows(matrix.T), matrix.T) and in_rows(matrix.T).is_contiguous()
    for as_it_is in (matrix, matrix[:, :100].T, matrix.float().T, torch.randn(8, 600).to(torch.bfloat16).T):
        assert in_rows(as_it_is) is as_it_is


def test_singular_vectors_have_the_precision_of_the_weight() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        layer = nn.Sequential(nn.Linear(12, 8)).to(dtype)
        tuned = attach(layer, dw.SVFit)
        (delta,) = tuned.parts()
        assert delta.u.dtype == delta.vh.dtype == dtype
        assert (delta.u.double().T @ delta.u.double() - torch.eye(8)).abs().max() < (
            2e-2 if dtype.itemsize == 2 else 1e-9
        )


@pytest.mark.parametrize("sizes", [(300, 1100), (1100, 300)])
@pytest.mark.parametrize("slug", [*COSTLY, "glora"])
def test_gradients_of_built_weights_from_many_rows_of_half_precision(slug: str, sizes: tuple[int, int]) -> None:
    method, settings = (COSTLY | {"glora": (dw.GLoRA, {"rank": 2})})[slug]
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(*sizes, bias=False)).bfloat16()
    tuned = attach(layer, method, **settings)
    nudge(tuned, 0.02)
    delta = next(delta for delta in tuned.parts() if delta.site.parameter == "weight")
    delta.prefers_side = lambda *_: False
    x = torch.randn(1600, sizes[0]).bfloat16().requires_grad_()
    g = torch.randn(1600, sizes[1]).bfloat16()
    found = torch.autograd.grad(layer(x), [x, *delta.parameters()], g)
    whole = nn.functional.linear(x.float(), delta.fold(layer[0].weight.detach().float()))
    expected = torch.autograd.grad(whole, [x, *delta.parameters()], g.float())
    assert all((a.float() - b.float()).norm() < 0.01 * b.float().norm() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("train", ["a", "b", "ab"])
@pytest.mark.parametrize("stacked", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(24, 16), (16, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_tokens_in_half_precision_take_a_branch_of_single_precision(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    dropout: float,
    stacked: int,
    train: str,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes)).to(dtype)
    tuned = [dw.attach(model, dw.LoRA(rank=4, dropout=dropout, on="all"), name=name) for name in "ab"[:stacked]]
    for handle in tuned:
        nudge(handle, 0.3)
    dw.activate(model, list("ab"[:stacked]))
    x, g = torch.randn(5, sizes[0]).to(dtype).requires_grad_(), torch.randn(5, sizes[1]).to(dtype)
    for handle in tuned:
        delta = part(handle, "")
        for name in "ab":
            getattr(delta, name).requires_grad_(name in train)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {factor.dtype for factor in factors} == {torch.float32}

    def run() -> tuple[list[Tensor], set[torch.dtype]]:
        torch.manual_seed(1)
        kept: set[torch.dtype] = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape == (5, 4):
                kept.add(tensor.dtype)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        return [y, *torch.autograd.grad(y, [x, *factors], g)], kept

    few, single = run()
    monkeypatch.setattr(low_rank, "FEW", 5 * 24 - 1)
    many, half = run()
    assert (single, half) == (({torch.float32}, {dtype}) if "b" in train else (set(), set()))
    assert [tensor.dtype for tensor in few] == [tensor.dtype for tensor in many]
    assert all((a - b).float().norm() < 0.02 * a.float().norm() for a, b in zip(few, many, strict=True))
    if not dropout:
        weight = sum((part(handle, "").dense().double() for handle in tuned), model[0].weight.double())
        y = nn.functional.linear(x.double(), weight, model[0].bias.double())
        exact = torch.autograd.grad(y, factors, g.double())
        for a, b, c in zip(few[2:], many[2:], exact, strict=True):
            assert (a - c).norm() < 1e-5 * c.norm() < (b - c).norm()
