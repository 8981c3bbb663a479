"""The forward process, its targets and the masked loss, against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config import DiffusionConfig, ModelConfig
from maskdm.diffusion import (
    add_noise,
    alphas_bar,
    denoising_loss,
    implied_noise,
    masked_loss,
    predicted_x0,
    prediction_target,
    to_model_range,
)
from maskdm.model import build_model, patchify

PREDICTIONS = ("epsilon", "x0", "v")


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


@given(
    prediction=st.sampled_from(PREDICTIONS),
    x0=st.floats(-1, 1),
    noise=st.floats(-4, 4),
    abar=st.floats(1e-4, 1 - 1e-4),
)
def test_the_target_and_the_noisy_value_give_the_clean_value_and_the_noise_back(
    prediction: str, x0: float, noise: float, abar: float
) -> None:
    config = DiffusionConfig.model_validate({"prediction": prediction})
    clean, epsilon, a = (torch.full((1, 1, 1), v, dtype=torch.float64) for v in (x0, noise, abar))
    noisy = add_noise(clean, epsilon, a.flatten())
    assert float(noisy) == pytest.approx(math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise)
    target = prediction_target(config, clean, epsilon, a.flatten())
    assert float(predicted_x0(config, target, noisy, a.flatten())) == pytest.approx(x0, abs=1e-9)
    assert float(implied_noise(clean, noisy, a.flatten())) == pytest.approx(noise, abs=1e-9)


def test_pixels_map_onto_minus_one_to_one() -> None:
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_mean_squared_error_over_what_the_denoiser_was_given(prediction: str) -> None:
    config = DiffusionConfig.model_validate({"prediction": prediction, "timesteps": 10})
    schedule = alphas_bar(config).float()
    randomness = torch.Generator().manual_seed(0)
    patches, noise, answer = (torch.randn(2, 3, 4, generator=randomness) for _ in range(3))
    visible, timesteps = torch.tensor([[0, 2, 5], [1, 3, 4]]), torch.tensor([2, 9])

    def denoiser(noisy: Tensor, positions: Tensor | None, steps: Tensor) -> Tensor:
        assert noisy.shape == patches.shape
        assert positions is visible
        assert steps is timesteps
        return answer

    found = masked_loss(denoiser, config, schedule, patches, visible, timesteps, noise)
    for i in range(2):
        target = prediction_target(config, patches[i : i + 1], noise[i : i + 1], schedule[timesteps[i : i + 1]])
        assert float(found[i]) == pytest.approx(float((answer[i] - target).pow(2).sum()) / 12, rel=1e-5)


def test_a_perfect_denoiser_has_no_loss() -> None:
    config = DiffusionConfig(prediction="x0", timesteps=10)
    clean = torch.rand(2, 3, 4)
    loss = masked_loss(
        lambda *_: clean, config, alphas_bar(config).float(), clean, None, torch.tensor([0, 9]), torch.randn(2, 3, 4)
    )
    assert loss.tolist() == [0.0, 0.0]


def test_the_held_out_loss_repeats_for_a_seed_and_does_not_depend_on_the_batch_size(tiny: ModelConfig) -> None:
    model = build_model(tiny)
    config = DiffusionConfig(timesteps=50)
    images = torch.randint(0, 256, (7, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    patches = patchify(images, tiny.patch_size)
    loss = denoising_loss(model, config, patches, draws=3, seed=1)
    assert denoising_loss(model, config, patches, draws=3, seed=1) == loss
    assert denoising_loss(model, config, patches, draws=3, seed=2) != loss
    for batch_size in (1, 4, 21):
        found = denoising_loss(model, config, patches, draws=3, seed=1, batch_size=batch_size)
        assert found == pytest.approx(loss, rel=1e-5)


def test_the_held_out_loss_of_a_denoiser_that_answers_zero_is_the_variance_of_the_noise() -> None:
    patches = torch.full((50, 16, 4), 128, dtype=torch.uint8)
    loss = denoising_loss(lambda x, *_: torch.zeros_like(x), DiffusionConfig(), patches, draws=8)
    assert loss == pytest.approx(1.0, abs=0.05)  # over five standard errors


def test_the_held_out_loss_visits_every_part_of_the_schedule_equally() -> None:
    seen: list[int] = []

    def denoiser(noisy: Tensor, _: Tensor | None, timesteps: Tensor) -> Tensor:
        seen.extend(timesteps.tolist())
        return noisy

    denoising_loss(denoiser, DiffusionConfig(timesteps=1000), torch.zeros(10, 4, 4, dtype=torch.uint8), draws=10)
    assert sorted(t // 10 for t in seen) == list(range(100))
