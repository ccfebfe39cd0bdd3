"""Layers that read one tensor share a product, and compute what they would compute alone."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.core.operators import low_rank


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small inputs of these tests count as large ones."""
    monkeypatch.setattr(low_rank, "FEW", 0)


def test_small_inputs_are_left_to_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = adapted()
    small, large = torch.randn(1, 3, 12).double(), torch.randn(2, 3000, 12).double()
    assert products(model, small) == 0 and products(model, large) == 1
    assert products(adapted().bfloat16(), small.bfloat16()) == 1, "no cast would spare these factors half precision"
    model.query(large.clone().requires_grad_())  # type: ignore[operator]
    sharing = model.query._modules["deltaworks"].board.sharing  # type: ignore[union-attr]
    assert sharing.shares
    model.query(small)  # type: ignore[operator]
    assert not sharing.shares, "what nobody fetched is let go"


class Attention(nn.Module):
    """Three layers that read x (or two of them a memory), and one that reads what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, 10) for _ in range(3))
        self.out = nn.Linear(10, 12)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        return self.out(self.query(x).tanh() * self.key(source) + self.value(source))


def adapted(seed: int = 0, method: Method | None = None) -> nn.Module:
    torch.manual_seed(seed)
    model = Attention().double()
    tuned = dw.attach(model, method or dw.LoRA(rank=2, alpha=5, on="all"), seed=seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def gradients(model: nn.Module, x: Tensor, memory: Tensor | None = None) -> list[Tensor | None]:
    inputs = [t.clone().requires_grad_() for t in (x, memory) if t is not None]
    loss = model(*inputs).square().sum()
    wanted = [*inputs, *(p for p in model.parameters() if p.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)]


def alone(model: nn.Module, x: Tensor, memory: Tensor | None = None) -> list[Tensor | None]:
    with mock.patch.object(low_rank.LowRank, "shareable", lambda *_: False):
        return gradients(model, x, memory)


def products(model: nn.Module, x: Tensor) -> int:
    """How often a forward pass multiplies with inner factors: once a group or once a layer."""
    with mock.patch("deltaworks.core.sharing.lowered", wraps=low_rank.lowered) as spy:
        model(x.clone().requires_grad_())
    return spy.call_count


X, MEMORY = torch.randn(4, 5, 12).double(), torch.randn(4, 7, 12).double()[:, :5]


@pytest.mark.parametrize("method", [dw.LoRA(rank=2, alpha=5, on="all"), dw.LoRAFA(rank=2, on="all")])
def test_shared_products_change_neither_output_nor_gradients(method: Method) -> None:
    model = adapted(method=method)
    expected = alone(model, X)
    for _ in range(3):
        torch.testing.assert_close(gradients(model, X), expected)
    assert products(model, X) == 1  # query, key and value; the output layer reads alone


def test_what_is_shared_does_not_depend_on_what_ran_before() -> None:
    model = adapted()
    first = gradients(model, X)
    gradients(model, X, MEMORY), gradients(model, X)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, X), first, strict=True))


def test_a_layer_that_reads_something_else_computes_for_itself() -> None:
    model = adapted()
    gradients(model, X), gradients(model, X)
    for _ in range(3):  # key and value read the memory here
        torch.testing.assert_close(gradients(model, X, MEMORY), alone(model, X, MEMORY))
    torch.testing.assert_close(gradients(model, X), alone(model, X))


def test_an_input_changed_in_place_is_multiplied_anew() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.first(x)
            if self.training:  # not where the model's description is made
                with torch.no_grad():
                    x.mul_(2)
            return y + self.second(x)

    torch.manual_seed(0)
    model = Changing().double()
    dw.attach(model, dw.LoRA(rank=2, on="all"))
    x = torch.randn(3, 6).double()
    for parameter in model.parameters():
        parameter.data.normal_()
    outputs = []
    for _ in range(3):
        with torch.no_grad():
            outputs.append(model(x))
    with mock.patch.object(low_rank.LowRank, "shareable", lambda *_: False), torch.no_grad():
        torch.testing.assert_close(outputs, [model(x)] * 3)
    with dw.disable(model):
        base = model(x)
    assert not torch.equal(outputs[0], base)


def test_gradient_checkpointing_and_frozen_passes_in_between() -> None:
    model = adapted()
    expected = alone(model, X)
    for reentrant in (True, False):
        for _ in range(2):
            with torch.no_grad():
                model(X)
            x = X.clone().requires_grad_()
            loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()  # type: ignore[union-attr]
            loss.backward()
            got = [loss.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
            torch.testing.assert_close(got, expected)
            model.zero_grad()


def test_switching_disabling_and_detaching_in_between() -> None:
    model = adapted()
    gradients(model, X), gradients(model, X)
    dw.attach(model, dw.LoRA(rank=2, on="all"), name="second", seed=3)
    for names in (["second"], ["default"], ["default", "second"]):
        dw.activate(model, names)
        torch.testing.assert_close(gradients(model, X), alone(model, X))
        torch.testing.assert_close(gradients(model, X), alone(model, X))
    dw.detach(model)
    assert not any(hasattr(module, "deltaworks") for module in model.modules())


def test_copies_and_pickles_share_on_their_own() -> None:
    model = adapted()
    gradients(model, X)
    query = model.query.forward  # type: ignore[union-attr]
    query(X.clone().requires_grad_())  # leaves shares that nobody fetches
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(gradients(twin, X), alone(model, X))
        torch.testing.assert_close(gradients(twin, X), alone(model, X))
        assert products(twin, X) == 1


def test_an_output_nobody_uses() -> None:
    model = adapted()
    gradients(model, X), gradients(model, X)
    x = X.clone().requires_grad_()
    query, _, value = model.query(x), model.key(x), model.value(x)  # type: ignore[operator]
    (query * value).sum().backward()
    assert x.grad is not None
    assert model.key.deltaworks.default.weight.b.grad is None  # type: ignore[union-attr]
