"""Samplers against a distribution whose best denoiser is known: for data N(m, s²), E[x_0 | x_t] is a straight line."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config import DiffusionConfig, ModelConfig
from maskdm.diffusion import alphas_bar
from maskdm.model import build_model
from maskdm.sampling import (
    Sampler,
    X0At,
    sample,
    sample_ddim,
    sample_dpmpp_2m,
    timestep_grid,
    x0_estimator,
)

MEAN, STD = 0.3, 0.2


def exact_denoiser(schedule: Tensor) -> X0At:
    def x0_at(x: Tensor, t: int) -> Tensor:
        a = schedule[t]
        gain = a.sqrt() * STD**2 / (a * STD**2 + 1 - a)
        return MEAN + gain * (x - a.sqrt() * MEAN)

    return x0_at


def draw(sampler: Sampler, schedule: Tensor, x: Tensor, steps: int, *, eta: float = 0.0, seed: int = 0) -> Tensor:
    x0_at = exact_denoiser(schedule)
    if sampler == "ddim":
        return sample_ddim(
            x0_at,
            schedule,
            x,
            steps,
            eta=eta,
            randomness=[torch.Generator().manual_seed(seed + i) for i in range(len(x))],
        )
    return sample_dpmpp_2m(x0_at, schedule, x, steps)


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 200), ("dpmpp", 50)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_deterministic_samplers_carry_noise_onto_the_data_distribution(
    sampler: Sampler, steps: int, schedule: str
) -> None:
    abar = alphas_bar(DiffusionConfig.model_validate({"schedule": schedule}))
    # Every step is affine in x, so the images of 0 and 1 give mean and standard deviation without sampling error.
    at_zero, at_one = draw(sampler, abar, torch.tensor([[0.0], [1.0]], dtype=torch.float64), steps).flatten().tolist()
    assert at_zero == pytest.approx(MEAN, abs=0.01)
    assert at_one - at_zero == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_more_steps_come_closer_to_the_data_distribution(sampler: Sampler) -> None:
    abar = alphas_bar(DiffusionConfig())
    errors = []
    for steps in (5, 20, 80):
        low, high = draw(sampler, abar, torch.tensor([[0.0], [1.0]], dtype=torch.float64), steps).flatten().tolist()
        errors.append(abs(low - MEAN) + abs(high - low - STD))
    assert errors[0] > errors[1] > errors[2]


def test_the_second_order_sampler_needs_fewer_steps_than_ddim() -> None:
    abar = alphas_bar(DiffusionConfig())
    start = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    ddim, dpmpp = (draw(sampler, abar, start, 20).diff(dim=0).item() for sampler in ("ddim", "dpmpp"))
    assert abs(dpmpp - STD) < abs(ddim - STD)


def test_ancestral_sampling_draws_from_the_data_distribution() -> None:
    abar = alphas_bar(DiffusionConfig())
    noise = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = draw("ddim", abar, noise, 200, eta=1.0)
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(drawn.std()) == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_last_step_lands_on_the_clean_estimate_itself(sampler: Sampler, steps: int) -> None:
    abar = alphas_bar(DiffusionConfig(timesteps=20))
    asked: list[int] = []

    def x0_at(x: Tensor, t: int) -> Tensor:
        asked.append(t)
        return torch.full_like(x, float(t))

    x = torch.ones(1, 2, dtype=torch.float64)
    if sampler == "ddim":
        found = sample_ddim(x0_at, abar, x, steps, eta=0.0, randomness=[torch.Generator()])
    else:
        found = sample_dpmpp_2m(x0_at, abar, x, steps)
    assert asked == timestep_grid(20, steps)
    assert found.tolist() == [[float(asked[-1])] * 2]


@given(total=st.integers(2, 1500), share=st.floats(0, 1))
def test_timestep_grids_are_distinct_fall_evenly_and_reach_zero(total: int, share: float) -> None:
    steps = max(2, round(share * total))
    grid = timestep_grid(total, steps)
    assert len(grid) == steps
    assert (grid[0], grid[-1]) == (total - 1, 0)
    gaps = [before - after for before, after in itertools.pairwise(grid)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 2


def test_a_single_step_starts_where_the_noise_is() -> None:
    assert timestep_grid(1000, 1) == [999]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_clean_estimates_stay_in_the_range_of_pixels(prediction: str) -> None:
    config = DiffusionConfig.model_validate({"prediction": prediction, "timesteps": 20})
    x0_at = x0_estimator(lambda x, *_: 50 * x, config, alphas_bar(config))
    estimate = x0_at(torch.randn(2, 3, 4, dtype=torch.float64), 19)
    assert float(estimate.abs().max()) <= 1


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpmpp", 0.0)])
def test_the_same_seed_draws_the_same_images_whatever_the_batch_size(
    tiny: ModelConfig, sampler: Sampler, eta: float
) -> None:
    model = build_model(tiny)

    def images(seed: int, batch_size: int = 64) -> Tensor:
        return sample(
            model, DiffusionConfig(timesteps=50), 5, sampler=sampler, steps=6, eta=eta, seed=seed, batch_size=batch_size
        )

    first = images(1)
    assert first.shape == (5, 1, 8, 8)
    assert first.dtype == torch.uint8
    assert torch.equal(images(1), first)
    assert not torch.equal(images(2), first)
    assert int((images(1, batch_size=2).int() - first.int()).abs().max()) <= 1  # rounding to 8 bits


def test_ancestral_sampling_adds_noise_of_its_own_to_each_image() -> None:
    abar = alphas_bar(DiffusionConfig(timesteps=20))
    first, second = draw("ddim", abar, torch.ones(2, 3, dtype=torch.float64), 10, eta=1.0)
    assert not torch.allclose(first, second)


def test_more_steps_than_the_schedule_has_are_cut_and_progress_is_told(tiny: ModelConfig) -> None:
    model = build_model(tiny).train()
    told: list[int] = []
    sample(model, DiffusionConfig(timesteps=4), 5, steps=1000, batch_size=2, progress=told.append)
    assert told == [2, 4, 5]
    assert model.training


def test_reduced_precision_draws_nearly_the_same_images(tiny: ModelConfig) -> None:
    model = build_model(tiny)
    config = DiffusionConfig(timesteps=50)
    full, reduced = (sample(model, config, 3, steps=5, precision=precision) for precision in ("fp32", "bf16"))
    assert float((full.float() - reduced.float()).abs().mean()) < 3
