"""FourierFT: a few frequencies make a matrix."""

from __future__ import annotations

import math

import pytest
import torch

import deltaworks as dw
from deltaworks.core.operators.spectral import Spectral
from deltaworks.methods.structured.fourierft import chosen
from deltaworks.model.weights import Weight
from tests.methods.toys import attach, net, nudge, part, saved_shapes


def spectral(fan_out: int, fan_in: int, n: int, alpha: float = 7.0) -> Spectral:
    generator = torch.Generator().manual_seed(3)
    entries = torch.randperm(fan_out * fan_in, generator=generator)[:n]
    return Spectral(torch.randn(n, dtype=torch.float64, generator=generator), entries, fan_out, fan_in, scale=alpha)


@pytest.mark.parametrize(("fan_out", "fan_in", "n"), [(6, 8, 5), (7, 9, 20), (8, 7, 56), (1, 6, 3), (6, 1, 4)])
def test_the_change_is_the_sum_of_cosines(fan_out: int, fan_in: int, n: int) -> None:
    delta = spectral(fan_out, fan_in, n)
    p, q = torch.meshgrid(torch.arange(fan_out).double(), torch.arange(fan_in).double(), indexing="ij")
    expected = torch.zeros(fan_out, fan_in, dtype=torch.float64)
    for c, entry in zip(delta.c.tolist(), delta.entries.tolist(), strict=True):
        j, k = divmod(entry, fan_in)
        expected += c * torch.cos(2 * math.pi * (p * j / fan_out + q * k / fan_in))
    assert torch.allclose(delta.dense(), 7.0 / (fan_out * fan_in) * expected)


def test_it_is_the_real_part_of_the_inverse_transform_with_few_bins_and_low_rank() -> None:
    delta = spectral(16, 20, 3)
    grid = torch.zeros(16, 20, dtype=torch.float64)
    grid.view(-1)[delta.entries.long()] = delta.c.detach()
    assert torch.allclose(delta.dense(), 7.0 * torch.fft.ifft2(grid).real)
    assert (torch.fft.fft2(delta.dense()).abs() > 1e-9).sum() <= 6
    assert torch.linalg.matrix_rank(delta.dense()) <= 6


def test_waves_and_transform_agree_in_outputs_and_gradients() -> None:
    delta = spectral(9, 8, 4)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 9, dtype=torch.float64)
    wave, dense = delta.side(x), x @ delta.dense().T
    assert torch.allclose(wave, dense)
    for a, b in zip(*(torch.autograd.grad(y, (x, delta.c), g) for y in (wave, dense)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize(("fan_out", "fan_in", "n"), [(33, 64, 200), (64, 33, 200), (7, 9, 63), (1, 6, 3)])
def test_tables_of_half_precision_make_the_same_matrix_and_gradient(fan_out: int, fan_in: int, n: int) -> None:
    delta = spectral(fan_out, fan_in, n, alpha=fan_out * fan_in / 4)
    weight, change = torch.randn(2, fan_out, fan_in, dtype=torch.float64).bfloat16()
    expected = weight.double() + delta.dense()
    made = delta.built(weight)
    assert (made - expected).norm() < 8e-3 * expected.norm()
    (wanted,) = torch.autograd.grad(delta.dense(), delta.c, change.double())
    (found,) = delta.pulled(weight, change.clone())
    assert (found - wanted).norm() < 2e-2 * wanted.norm()


def test_few_waves_are_applied_without_keeping_anything_wide() -> None:
    model, x = net(64, 48, 40)
    tuned = attach(model, dw.FourierFT, n=3)
    shapes = saved_shapes(lambda: model.first(x))
    assert shapes == [(10, 6), (6,)]
    assert part(tuned).prefers_side(10, Weight(model.first))


def test_many_coefficients_keep_the_input_and_no_matrix() -> None:
    model, x = net(12, 8, 6)
    attach(model, dw.FourierFT, n=50)
    x.requires_grad_()
    assert saved_shapes(lambda: model.first(x)) == [(2, 5, 12)]


def test_layers_of_one_shape_share_their_entries_and_others_do_not() -> None:
    model, _ = net(8, 8, 8)
    tuned = attach(model, dw.FourierFT, n=5)
    first, second = tuned.parts()
    assert torch.equal(first.entries, second.entries)
    assert not torch.equal(chosen(8, 8, 5, 2024, None, 200.0), chosen(8, 16, 5, 2024, None, 200.0))


def test_entries_are_written_to_the_file(tmp_path) -> None:
    model, x = net(8, 8, 8)
    tuned = attach(model, dw.FourierFT, n=5)
    nudge(tuned)
    assert sum(p.numel() for p in tuned.parameters()) == 10
    assert sum(not t.is_floating_point() for t in tuned.tensors().values()) == 2
    dw.save(model, tmp_path / "adapter")
    twin, _ = net(8, 8, 8)
    dw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(x), model(x))


def test_a_position_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all below 12 \(3 x 4\)"):
        Spectral(torch.ones(1), torch.tensor([12]), 3, 4)


def test_there_are_never_more_coefficients_than_entries() -> None:
    model, _ = net(4, 3, 2)
    tuned = attach(model, dw.FourierFT, n=1000)
    assert [delta.c.numel() for delta in tuned.parts()] == [12, 6]
    assert part(tuned).entries.unique().numel() == 12


def test_zeros_leave_the_output_unchanged_and_coefficients_do_not_decay() -> None:
    model, x = net()
    base = model(x)
    tuned = attach(model, dw.FourierFT, init="zeros")
    assert torch.allclose(model(x), base, atol=1e-14)
    assert all(group["weight_decay"] == 0 for group in tuned.parameter_groups(1e-2, weight_decay=0.1))


def test_a_preferred_frequency_draws_entries_around_it() -> None:
    def distances(center: float | None, width: float) -> torch.Tensor:
        entries = chosen(64, 64, 100, 0, center, width)
        assert entries.unique().numel() == 100
        rows, columns = entries // 64, entries % 64
        return torch.hypot(torch.minimum(rows, 64 - rows).double(), torch.minimum(columns, 64 - columns).double())

    near, far, free = distances(5.0, 2.0), distances(25.0, 2.0), distances(None, 2.0)
    assert (near - 5).abs().mean() < 2 and (far - 25).abs().mean() < 2 < (free - 25).abs().mean()


def test_what_trains_beside_it_decays_as_the_run_says() -> None:
    model, _ = net(12, 8, 6)
    tuned = dw.attach(model, dw.FourierFT(n=5, on="first"), also="second", seed=0)
    groups = tuned.parameter_groups(1e-2, weight_decay=0.1)
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays == {"first.weight.c": 0.0, "second.weight": 0.1, "second.bias": 0.1}


def test_a_width_without_a_centre_is_refused() -> None:
    with pytest.raises(ValueError, match="width=50 is of a preferred frequency; give center as well"):
        dw.FourierFT(width=50)
    assert dw.FourierFT(width=50, center=5).width == 50
