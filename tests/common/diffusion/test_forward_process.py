"""The three forward processes against their closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskdm.config import DiffusionConfig, ProcessKind
from maskdm.diffusion.forward_process import alphas_bar, forward_process

PROCESSES: tuple[ProcessKind, ...] = ("ddpm", "edm", "flow")


@given(schedule=st.sampled_from(["linear", "cosine"]), timesteps=st.integers(2, 2000))
def test_schedules_fall_strictly_inside_zero_and_one(schedule: str, timesteps: int) -> None:
    abar = alphas_bar(DiffusionConfig.model_validate({"schedule": schedule, "timesteps": timesteps}))
    assert abar.shape == (timesteps,)
    assert abar.dtype == torch.float64
    assert (abar.diff() < 0).all()
    assert 0 < float(abar[-1]) < float(abar[0]) < 1


def test_the_linear_schedule_of_1000_steps_is_the_published_one() -> None:
    abar = alphas_bar(DiffusionConfig(schedule="linear"))
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
    assert float(abar[0]) == pytest.approx(1 - 1e-4)
    assert float(abar[-1]) == pytest.approx(product, rel=1e-9)
    assert product == pytest.approx(4.04e-5, rel=1e-2)


def test_the_cosine_schedule_follows_its_closed_form_and_ends_in_noise() -> None:
    abar = alphas_bar(DiffusionConfig(schedule="cosine"))

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 499, 900):  # before the last steps, where β is clamped
        assert float(abar[t]) == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-9)
    assert float(abar[0]) > 0.9999
    assert float(abar[-1]) < 1e-6


@pytest.mark.parametrize("kind", PROCESSES)
def test_times_cover_the_training_distribution_and_noise_grows_with_them(kind: ProcessKind) -> None:
    process = forward_process(DiffusionConfig(process=kind))
    quantiles = torch.linspace(0, 1 - 1e-6, 2001)
    times = process.times(quantiles)
    alpha, sigma = process.level(times)
    ratio = (sigma / alpha).double()
    assert (ratio.diff() >= 0).all()
    assert ratio.isfinite().all()
    told = process.network_time(times)
    assert float(told.min()) > -1000
    assert float(told.max()) < 1500
    if kind == "ddpm":
        assert torch.allclose(alpha**2 + sigma**2, torch.ones(2001, dtype=torch.float64))
        assert times.bincount().tolist() == pytest.approx([2] * 1000, abs=1)  # every timestep equally
    elif kind == "edm":
        logs = process.times(torch.rand(200_000, generator=torch.Generator().manual_seed(0))).log()
        assert float(logs.mean()) == pytest.approx(-1.2, abs=0.02)
        assert float(logs.std()) == pytest.approx(1.2, abs=0.02)
        assert (alpha == 1).all()
    else:
        assert torch.allclose(alpha + sigma, torch.ones(2001))


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("spacing", ["time", "log-snr"])
@given(steps=st.integers(1, 60))
def test_grids_fall_from_noise_to_nearly_nothing(kind: ProcessKind, spacing: str, steps: int) -> None:
    process = forward_process(DiffusionConfig(process=kind))
    times = process.grid(steps, spacing)  # type: ignore[arg-type]
    assert len(times) == steps or (kind == "ddpm" and spacing == "log-snr" and 1 <= len(times) <= steps)
    assert (times.diff() < 0).all()
    alpha, sigma = process.level(times)
    assert float(sigma[0] / alpha[0]) > 50
    assert float(sigma[-1]) > 0


@given(total=st.integers(2, 1500), share=st.floats(0, 1))
def test_discrete_grids_are_distinct_even_and_reach_zero(total: int, share: float) -> None:
    steps = max(2, round(share * total))
    grid = forward_process(DiffusionConfig(timesteps=total)).grid(steps, "time").tolist()
    assert len(grid) == steps
    assert (grid[0], grid[-1]) == (total - 1, 0)
    gaps = [before - after for before, after in itertools.pairwise(grid)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 2


def test_more_steps_than_a_schedule_has_are_all_of_them() -> None:
    assert forward_process(DiffusionConfig(timesteps=4)).grid(1000, "time").tolist() == [3, 2, 1, 0]


def test_the_edm_grid_is_equation_5() -> None:
    grid = forward_process(DiffusionConfig(process="edm")).grid(18, "time")
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert grid.tolist() == pytest.approx(expected)


def test_the_edm_input_has_unit_variance_for_data_of_the_assumed_spread() -> None:
    process = forward_process(DiffusionConfig(process="edm", sigma_data=0.5))
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0])
    scale = process.input_scale(torch.ones(4), sigma)
    assert scale is not None
    assert (scale**2 * (0.25 + sigma**2)).tolist() == pytest.approx([1.0] * 4)
