"""FourierFT and C3A compute what `peft` computes, once its single-precision casts are double ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaworks as dw
from deltaworks.core.operators.circulant import Circulant
from tests.methods.toys import net
from tests.parity.twins import assert_equal, layer, twins

peft = pytest.importorskip("peft")
BOTH = ["first", "second"]


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("n", [1, 20])
def test_fourierft(n: int) -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return {"c": layer.fourierft_spectrum["default"]}

    method = dw.FourierFT(on=nn.Linear, n=n, alpha=150.0, seed=777)
    config = peft.FourierFTConfig(n_frequency=n, scaling=150.0, target_modules=BOTH, random_loc_seed=777)
    ours, tuned, theirs = twins(method, config, translate)
    for name, part in tuned.named_parts():
        rows, columns = layer(theirs, name).indices["default"]
        assert torch.equal(part.entries.long(), rows * part.fan_in + columns)
    assert_equal(ours, tuned, theirs, translate)


@pytest.mark.parametrize("block", [1, 2])
def test_c3a(block: int) -> None:
    def translate(layer) -> dict[str, torch.Tensor]:
        return {"w": layer.c3a_kernel["default"]}

    method = dw.C3A(on=nn.Linear, block=block)
    config = peft.C3AConfig(block_size=block, target_modules=BOTH)
    assert_equal(*twins(method, config, translate), translate)


@pytest.mark.parametrize("shape", [(2, 3, 32), (1, 1, 33), (3, 2, 4)])
def test_the_circulant_operator(shape: tuple[int, int, int]) -> None:
    """The hand-written backward in `peft` is not the derivative of its forward for b > 2: autograd's is taken."""
    from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast

    generator = torch.Generator().manual_seed(0)
    delta = Circulant(torch.randn(shape, generator=generator))
    x = torch.randn(5, shape[1] * shape[2], generator=generator).requires_grad_()
    w = delta.w.detach().clone().requires_grad_()
    ours = delta.side(x)
    assert torch.allclose(ours, BlockCircularConvolution.apply(x, w))
    assert torch.allclose(delta.dense(), get_circulant_fast(w))
    g = torch.randn(ours.shape, generator=generator)
    theirs = x @ get_circulant_fast(w).T
    for a, b in zip(torch.autograd.grad(ours, (x, delta.w), g), torch.autograd.grad(theirs, (x, w), g), strict=True):
        assert torch.allclose(a, b)


def test_c3a_starts_like_theirs() -> None:
    for init, flag in (("xavier", "xavier_uniform"), ("kaiming", "kaiming_uniform"), ("zeros", True)):
        theirs = peft.get_peft_model(
            net(64, 32, 32)[0], peft.C3AConfig(block_size=4, target_modules=BOTH, init_weights=flag)
        )
        ours = dw.attach(net(64, 32, 32)[0], dw.C3A(on=nn.Linear, block=4, init=init), seed=0)
        expected = layer(theirs, "first").c3a_kernel["default"].double()
        found = next(ours.parts()).w
        assert found.shape == expected.shape
        assert abs(found.abs().max() - expected.abs().max()) <= 0.1 * expected.abs().max()
