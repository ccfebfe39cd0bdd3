"""What functions keep of an input that is a product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import deltaworks as dw
from deltaworks.core.costs import saved_bytes
from deltaworks.core.operators import saving
from tests.methods.toys import nudge

TOKENS, WIDE = 24, 40
METHODS = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "boft": {"block": 4},
    "oft": {"block": 4},
    "fourierft": {"n": 30},
    "c3a": {"block": 8},
    "dsee": {"rank": 2},
    "monarch": {"blocks": 4},
    "mora": {"rank": 2},
    "krona": {},
    "increlora": {},
    "melora": {"rank": 4, "n": 2},
}


class Gated(nn.Module):
    """A gated block, in which autograd keeps both factors of what the last layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, WIDE), nn.Linear(16, WIDE), nn.Linear(WIDE, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def gated(slug: str = "lora", dtype: torch.dtype = torch.float64, **settings) -> tuple[nn.Module, Tensor, dw.Tuned]:
    torch.manual_seed(0)
    model = Gated().to(dtype)
    tuned = dw.attach(model, dw.method(slug, on="all", **(settings or METHODS[slug])))
    nudge(tuned, 0.3)
    return model, torch.randn(2, TOKENS // 2, 16, dtype=dtype), tuned


def gradients(model: nn.Module, x: Tensor, tuned: dw.Tuned) -> list[Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    return list(torch.autograd.grad(model(x).square().sum(), [x, *tuned.parameters()]))


def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_factors", lambda x: (x, None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slug", METHODS)
def test_a_product_is_not_kept_beside_its_factors(monkeypatch, slug: str, dtype: torch.dtype) -> None:
    model, x, tuned = gated(slug, dtype)
    found, few = gradients(model, x, tuned), saved_bytes(model, lambda: model(x.requires_grad_()).sum())
    keeps_all(monkeypatch)
    expected, many = gradients(model, x, tuned), saved_bytes(model, lambda: model(x.requires_grad_()).sum())
    assert many - few == TOKENS * WIDE * dtype.itemsize
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dropout_falls_on_the_product_again(monkeypatch) -> None:
    model, x, tuned = gated(rank=2, dropout=0.5)
    found = gradients(model, x, tuned)
    keeps_all(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(model, x, tuned), strict=True))


@pytest.mark.parametrize("kept", ["elsewhere", "as a note", "recomputed", "recomputed by a graph of its own"])
def test_hooks_that_store_something_else_are_left_to_it(kept: str) -> None:
    model, x, tuned = gated()
    expected = gradients(model, x, tuned)

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if kept.startswith("recomputed"):
                return checkpoint(model, x, use_reentrant=kept != "recomputed")
            notes: list[Tensor] = []
            note = saved_tensors_hooks(lambda t: notes.append(t) or len(notes) - 1, notes.__getitem__)
            with save_on_cpu() if kept == "elsewhere" else note:
                return model(x)

    if kept == "recomputed by a graph of its own":
        x = x.clone().requires_grad_()
        Wrapped()(x).square().sum().backward()
        found = [x.grad, *(parameter.grad for parameter in tuned.parameters())]
    else:
        found = gradients(Wrapped(), x, tuned)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_only_a_product_of_two_tensors_alike_that_nobody_wrote_to() -> None:
    factors = saving._factors
    a, b = (torch.randn(3, 4, requires_grad=True).exp() for _ in range(2))
    first, second = factors(a * b)
    assert first is not None and second is not None
    assert torch.equal(first * second, a * b)
    assert factors(a * a)[1] is not None
    written = a * b
    with torch.no_grad():
        written.add_(1)
    twice = a * 1.0
    twice.mul_(b)
    others = {
        "written to": written,
        "multiplied in place": twice,
        "broadcast": a * b[0],
        "with a number": a * 2.0,
        "one factor kept": a * b.detach(),
        "of two precisions": a * b.double(),
        "a sum": a + b,
        "a view": (a * b).view(4, 3),
        "a leaf": a.detach().requires_grad_(),
        "of leaves": a.detach().requires_grad_() * b.detach().requires_grad_(),
        "without gradients": a.detach() * b.detach(),
    }
    for why, x in others.items():
        same, none = factors(x)
        assert same is x and none is None, why
    gone = a * b
    gone.sum().backward()
    assert factors(gone)[0] is gone, "its graph has let go of the factors"
    assert factors(None) == (None, None)


def test_a_second_backward_pass_multiplies_again() -> None:
    model, x, tuned = gated()
    loss = model(x.requires_grad_()).square().sum()
    parameters = tuned.parameters()
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(loss, parameters), strict=True))


def test_a_factor_that_is_written_to_is_refused_as_autograd_does() -> None:
    model, x, tuned = gated()
    written: list[Tensor] = []
    model.up.register_forward_hook(lambda _module, _inputs, output: written.append(output))
    loss = model(x).square().sum()
    with torch.no_grad():
        written[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, list(tuned.parameters()))
