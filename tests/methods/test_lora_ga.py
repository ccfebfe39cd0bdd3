"""LoRA-GA starts along the gradient, so that its first step is the best low-rank step of full fine-tuning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.statistics import mean_gradients, product_gradients
from tests.families import FAMILIES

PATH = "model.layers.0.mlp.up_proj"


def data(seed: int = 0, count: int = 2) -> tuple[nn.Module, list[dict]]:
    model, _ = FAMILIES["llama"]()
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 64, (4, 16), generator=generator) for _ in range(count)]
    return model.double(), [{"input_ids": one, "labels": one} for one in ids]


def gradient(model: nn.Module, batches: list[dict]) -> Tensor:
    return mean_gradients(model, [f"{PATH}.weight"], batches, dtype=torch.float64)[f"{PATH}.weight"]


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_factors_are_orthonormal_up_to_c_and_take_the_named_singular_vectors(direction: str) -> None:
    model, batches = data()
    base, g = model(**batches[0]).logits, gradient(model, batches)
    tuned = dw.attach(model, dw.LoRAGA(on="mlp.up", rank=3, direction=direction), data=batches, seed=0)
    assert torch.allclose(model(**batches[0]).logits, base, atol=1e-9)
    part = next(tuned.parts())
    squared = 48**0.5 / 16
    assert torch.allclose(part.a @ part.a.T, squared * torch.eye(3).double(), atol=1e-5)
    assert torch.allclose(part.b.T @ part.b, squared * torch.eye(3).double(), atol=1e-5)
    u, _, vh = torch.linalg.svd(g)
    first = {
        "ArB2r": (range(3), range(3, 6)),
        "A2rBr": (range(3, 6), range(3)),
        "ArBr": (range(1, 6, 2), range(0, 6, 2)),
    }
    if direction != "random":
        for_a, for_b = (list(index) for index in first[direction])
        assert (torch.linalg.svdvals(part.a @ vh[for_a].T) / squared**0.5 - 1).abs().max() < 1e-3
        assert (torch.linalg.svdvals(part.b.T @ u[:, for_b]) / squared**0.5 - 1).abs().max() < 1e-3


def first_step(method: dw.core.method.Method) -> tuple[Tensor, Tensor]:
    """The change of one weight by one small step of descent, and the gradient."""
    model, batches = data(count=1)
    g = gradient(model, batches)
    part = next(dw.attach(model, method, data=batches, seed=0).parts())
    before = part.dense().detach()
    model(**batches[0]).loss.backward()
    with torch.no_grad():
        for parameter in (part.a, part.b):
            parameter.sub_(parameter.grad, alpha=1e-4)
    return (part.dense() - before).detach(), g


def test_the_first_step_follows_the_best_rank_2r_approximation_of_the_gradient() -> None:
    change, g = first_step(dw.LoRAGA(on=PATH, rank=3, alpha=16.0))
    u, s, vh = torch.linalg.svd(g)
    best = u[:, :6] @ torch.diag(s[:6]) @ vh[:6]
    assert torch.cosine_similarity(change.flatten(), -best.flatten(), dim=0) > 0.999
    size, c = 16 / 3**0.5, 48**0.25 / 4
    assert abs(change.norm() / (1e-4 * size**2 * c**2 * best.norm()) - 1) < 1e-2
    plain, _ = first_step(dw.LoRA(on=PATH, rank=3))
    assert torch.cosine_similarity(plain.flatten(), -best.flatten(), dim=0) < 0.9


def test_other_examples_give_other_factors() -> None:
    made = []
    for seed in (0, 1):
        model, _ = data()
        tuned = dw.attach(model, dw.LoRAGA(on=PATH, rank=3), data=data(seed)[1], seed=0)
        made.append(next(tuned.parts()).a.detach())
    assert (made[0] - made[1]).abs().max() > 0.05


def test_two_batches_are_as_good_as_both_in_one() -> None:
    model, batches = data()
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    assert torch.allclose(gradient(model, batches), gradient(model, [joined]), atol=1e-10)


def test_gradients_without_the_weight_are_the_weights_gradients() -> None:
    for family, path, transposed in (("llama", PATH, False), ("gpt2", "transformer.h.0.mlp.c_fc", True)):
        model, batch = FAMILIES[family]()
        model.double()
        before = copy.deepcopy(model.state_dict())
        expected = mean_gradients(model, [f"{path}.weight"], [batch], dtype=torch.float64)[f"{path}.weight"]
        found = product_gradients(model, [path], [batch], dtype=torch.float64)[path]
        assert torch.allclose(found, expected.T if transposed else expected, atol=1e-12)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sizes_of_the_start() -> None:
    norms = {}
    for size in ("unit", "gd", "weight"):
        model, batches = data()
        part = next(dw.attach(model, dw.LoRAGA(on=PATH, rank=4, alpha=8.0, size=size), data=batches, seed=0).parts())
        norms[size] = part.a.norm(dim=1).mean().item()
        values = torch.linalg.svdvals(model.get_parameter(f"{PATH}.weight"))[:4]
    assert abs(norms["unit"] - 1) < 1e-4 and abs(norms["gd"] - 1 / 4) < 1e-4
    assert abs(norms["weight"] / (values / 4).sqrt().mean().item() - 1) < 0.05


def test_a_file_needs_neither_data_nor_gradients(tmp_path) -> None:
    model, batches = data()
    dw.attach(model, dw.LoRAGA(on=PATH, rank=3), data=batches, seed=0)
    dw.save(model, tmp_path / "adapter")
    expected = model(**batches[0]).logits
    fresh, _ = data()
    dw.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batches[0]).logits, expected)


class Scorer(nn.Module):
    """One linear layer, as the head of a reward model is."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(fan_in, fan_out)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1, 1)])
def test_a_weight_of_one_row_or_column_starts_along_the_one_direction_it_has(
    shape: tuple[int, int], direction: str
) -> None:
    torch.manual_seed(0)
    model = Scorer(*shape).double()
    batch = {"x": torch.randn(8, shape[0]).double(), "labels": torch.randn(8, shape[1]).double()}
    g = mean_gradients(model, ["layer.weight"], [batch], dtype=torch.float64)["layer.weight"]
    base = model(**batch)["logits"].detach()
    delta = next(dw.attach(model, dw.LoRAGA(on=nn.Linear, direction=direction), data=[batch], seed=0).parts())
    assert torch.allclose(model(**batch)["logits"], base)
    before = delta.dense().detach()
    model(**batch)["loss"].backward()
    with torch.no_grad():
        for parameter in (delta.a, delta.b):
            parameter.sub_(parameter.grad, alpha=1e-4)
    assert torch.cosine_similarity((delta.dense() - before).flatten(), -g.flatten(), dim=0) > 0.999
