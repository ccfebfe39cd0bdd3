"""One factor trains, the other is a frozen projection."""

from __future__ import annotations

import pytest
import torch

import deltaworks as dw
from tests.methods.toys import attach, net, nudge, part, steps


@pytest.mark.parametrize("train", ["a", "b"])
def test_the_frozen_factor_is_orthonormal_and_stays_the_same_bits(train: str) -> None:
    model, x = net(12, 8, 6)
    base = model(x)
    tuned = attach(model, dw.LoRAAsym, rank=3, train=train)
    assert torch.equal(model(x), base)
    delta = part(tuned)
    frozen = delta.b if train == "a" else delta.a
    gram = frozen.T @ frozen if train == "a" else frozen @ frozen.T
    assert torch.allclose(gram, torch.eye(3, dtype=torch.float64), atol=1e-6)
    before = frozen.clone()
    list(steps(model, x, tuned, 3, decay=0.1))
    assert torch.equal(frozen, before) and delta.dense().norm() > 1e-3


@pytest.mark.parametrize(("train", "size"), [("b", 3 * 14), ("a", 3 * 20), ("both", 3 * 34)])
def test_only_the_chosen_factor_counts(train: str, size: int) -> None:
    model, _ = net(12, 8, 6)
    assert sum(p.numel() for p in attach(model, dw.LoRAAsym, rank=3, train=train).parameters()) == size


def descend(train: str, target: torch.Tensor, root: torch.Tensor) -> tuple:
    """Fit `dW` to `target` under inputs of covariance `root root^T` to the end."""
    model, _ = net(12, 8, 6)
    delta = part(attach(model, dw.LoRAAsym, rank=3, train=train, alpha=3.0))
    trained = delta.b if train == "b" else delta.a
    optimizer = torch.optim.LBFGS([trained], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((delta.dense() - target) @ root).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return delta.a.detach(), delta.b.detach()


def test_training_reaches_the_closed_forms_of_linear_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    cov = root @ root.T
    a, b = descend("b", target, root)
    assert torch.allclose(b, target @ cov @ a.T @ torch.linalg.inv(a @ cov @ a.T), atol=1e-5)
    a, b = descend("a", target, root)
    assert torch.allclose(a, b.T @ target, atol=1e-4)


def test_singular_vectors_are_those_of_the_weight() -> None:
    model, _ = net(12, 8, 6)
    u, _, vh = torch.linalg.svd(model.first.weight.detach(), full_matrices=False)
    delta = part(attach(model, dw.LoRAAsym, rank=3, a="v"))
    assert torch.allclose((delta.a @ vh[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-10)
    model, _ = net(12, 8, 6)
    delta = part(attach(model, dw.LoRAAsym, rank=3, train="a", b="u"))
    assert torch.allclose((delta.b.T @ u[:, :3]).abs(), torch.eye(3, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("settings", [{"a": "zero"}, {"train": "a", "b": "zero"}, {"train": "both", "a": "zero"}])
def test_starts_without_a_gradient_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="has no gradient"):
        dw.LoRAAsym(**settings)


def test_the_frozen_projection_is_what_the_output_reads() -> None:
    model, _ = net(12, 8, 6)
    tuned = attach(model, dw.LoRAAsym, rank=3)
    nudge(tuned)
    delta = part(tuned)
    assert (delta.dense() @ (torch.eye(12, dtype=torch.float64) - delta.a.T @ delta.a)).abs().max() < 1e-6
