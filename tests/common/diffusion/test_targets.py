"""Targets, weights and the masked loss, against closed forms."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config import DiffusionConfig, LossWeight, ModelConfig, Prediction, ProcessKind
from maskdm.diffusion.forward_process import forward_process
from maskdm.diffusion.targets import (
    add_noise,
    denoising_loss,
    implied_noise,
    loss_weight,
    masked_loss,
    predicted_x0,
    prediction_target,
    to_model_range,
)
from maskdm.networks.layers import patchify
from maskdm.networks.model import build_model

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "x0", "v", "velocity")
PROCESSES: tuple[ProcessKind, ...] = ("ddpm", "edm", "flow")


def numbers(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.float64) for value in values)


@given(
    process=st.sampled_from(PROCESSES),
    prediction=st.sampled_from(PREDICTIONS),
    x0=st.floats(-1, 1),
    noise=st.floats(-4, 4),
    quantile=st.floats(0.02, 0.98),
)
def test_the_target_and_the_noisy_value_give_the_clean_value_and_the_noise_back(
    process: ProcessKind, prediction: Prediction, x0: float, noise: float, quantile: float
) -> None:
    config = DiffusionConfig(process=process, prediction=prediction)
    forward = forward_process(config)
    alpha, sigma = (part.double() for part in forward.level(forward.times(torch.tensor([quantile]))))
    clean, epsilon = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (x0, noise))
    noisy = add_noise(clean, epsilon, alpha, sigma)
    assert float(noisy) == pytest.approx(float(alpha) * x0 + float(sigma) * noise)
    target = prediction_target(config, forward, clean, epsilon, alpha, sigma)
    assert float(predicted_x0(config, forward, target, noisy, alpha, sigma)) == pytest.approx(x0, abs=1e-8)
    assert float(implied_noise(clean, noisy, alpha, sigma)) == pytest.approx(noise, abs=1e-8)


@given(abar=st.floats(1e-3, 1 - 1e-3), x0=st.floats(-1, 1), noise=st.floats(-3, 3))
def test_the_target_v_is_the_published_one_where_variance_is_preserved(abar: float, x0: float, noise: float) -> None:
    config = DiffusionConfig(prediction="v")
    alpha, sigma, clean, epsilon = numbers(math.sqrt(abar), math.sqrt(1 - abar), x0, noise)
    found = prediction_target(config, forward_process(config), clean, epsilon, alpha, sigma)
    assert float(found) == pytest.approx(math.sqrt(abar) * noise - math.sqrt(1 - abar) * x0, abs=1e-9)


@given(sigma=st.floats(0.002, 80), x0=st.floats(-1, 1), noise=st.floats(-3, 3), spread=st.floats(0.1, 1))
def test_the_target_v_of_edm_is_its_preconditioned_network(
    sigma: float, x0: float, noise: float, spread: float
) -> None:
    """D = c_skip x + c_out F (Karras et al. 2022, table 1): the target of F is (x_0 − c_skip x)/c_out, here negated."""
    config = DiffusionConfig(process="edm", prediction="v", sigma_data=spread)
    one, level, clean, epsilon = numbers(1.0, sigma, x0, noise)
    found = prediction_target(config, forward_process(config), clean, epsilon, one, level)
    skip, out = spread**2 / (sigma**2 + spread**2), sigma * spread / math.sqrt(sigma**2 + spread**2)
    assert -float(found) == pytest.approx((x0 - skip * (x0 + sigma * noise)) / out, rel=1e-6, abs=1e-6)


SNR = 3.7
ALPHA, SIGMA = math.sqrt(SNR / (1 + SNR)), math.sqrt(1 / (1 + SNR))


@pytest.mark.parametrize(
    ("weight", "prediction", "expected"),
    [
        ("uniform", "epsilon", 1.0),
        ("uniform", "velocity", 1.0),
        # Hang et al. 2023: the error of x_0 by min(SNR, γ); ε divides by SNR, v by SNR + 1.
        ("min-snr", "x0", 2.0),
        ("min-snr", "epsilon", 2.0 / SNR),
        ("min-snr", "v", 2.0 / (SNR + 1)),
        # Choi et al. 2022: the error of ε by 1/(1 + SNR)^γ; x_0's error is SNR times smaller.
        ("p2", "epsilon", (1 + SNR) ** -0.7),
        ("p2", "x0", SNR * (1 + SNR) ** -0.7),
        ("p2", "v", SNR / (SNR + 1) * (1 + SNR) ** -0.7),
    ],
)
def test_loss_weights_are_the_published_ones_for_every_target(
    weight: LossWeight, prediction: Prediction, expected: float
) -> None:
    config = DiffusionConfig(prediction=prediction, loss_weight=weight, min_snr_gamma=2.0, p2_gamma=0.7)
    found = loss_weight(config, forward_process(config), *numbers(ALPHA, SIGMA))
    assert float(found) == pytest.approx(expected)


def test_below_its_limit_min_snr_does_not_cut() -> None:
    config = DiffusionConfig(prediction="x0", loss_weight="min-snr", min_snr_gamma=5.0)
    assert float(loss_weight(config, forward_process(config), *numbers(ALPHA, SIGMA))) == pytest.approx(SNR)


@given(process=st.sampled_from(PROCESSES), quantile=st.floats(0.01, 0.99), weight=st.sampled_from(["min-snr", "p2"]))
def test_a_weight_means_the_same_whatever_the_network_predicts(
    process: ProcessKind, quantile: float, weight: LossWeight
) -> None:
    """The same error of x_0, seen through each target, costs the same."""
    costs = []
    for prediction in PREDICTIONS:
        config = DiffusionConfig(process=process, prediction=prediction, loss_weight=weight)
        forward = forward_process(config)
        alpha, sigma = (part.double() for part in forward.level(forward.times(torch.tensor([quantile]))))
        clean, noise = numbers(0.3, -0.8)
        noisy = add_noise(clean, noise, alpha, sigma)
        wrong = clean + 0.1
        answer = prediction_target(config, forward, wrong, implied_noise(wrong, noisy, alpha, sigma), alpha, sigma)
        error = answer - prediction_target(config, forward, clean, noise, alpha, sigma)
        costs.append(float(loss_weight(config, forward, alpha, sigma) * error**2))
    assert costs == pytest.approx([costs[0]] * len(costs), rel=1e-5)


def test_pixels_map_onto_minus_one_to_one() -> None:
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_mean_squared_error_over_what_the_denoiser_was_given(
    process: ProcessKind, prediction: Prediction
) -> None:
    config = DiffusionConfig(process=process, prediction=prediction, timesteps=10)
    forward = forward_process(config)
    randomness = torch.Generator().manual_seed(0)
    patches, noise, answer = (torch.randn(2, 3, 4, generator=randomness) for _ in range(3))
    visible, times = torch.tensor([[0, 2, 5], [1, 3, 4]]), forward.times(torch.tensor([0.2, 0.9]))
    alpha, sigma = (part.float() for part in forward.level(times))
    kinds = torch.tensor([1, -1])

    def denoiser(noisy: Tensor, positions: Tensor | None, told: Tensor, classes: Tensor | None) -> Tensor:
        scale = forward.input_scale(alpha, sigma)
        factor = torch.ones(2) if scale is None else scale
        assert torch.allclose(noisy, add_noise(patches, noise, alpha, sigma) * factor[:, None, None])
        assert positions is visible
        assert classes is kinds
        assert torch.equal(told, forward.network_time(times))
        return answer

    found = masked_loss(denoiser, config, forward, patches, visible, times, noise, kinds)
    for i in range(2):
        one = slice(i, i + 1)
        target = prediction_target(config, forward, patches[one], noise[one], alpha[one], sigma[one])
        assert float(found[i]) == pytest.approx(float((answer[i] - target).pow(2).sum()) / 12, rel=1e-5)


def test_a_perfect_denoiser_has_no_loss() -> None:
    config = DiffusionConfig(prediction="x0", timesteps=10)
    clean = torch.rand(2, 3, 4)
    times, noise = torch.tensor([0, 9]), torch.randn(2, 3, 4)
    assert masked_loss(lambda *_: clean, config, forward_process(config), clean, None, times, noise).tolist() == [0, 0]


@pytest.mark.parametrize("extra", [{}, {"loss_weight": "p2"}, {"process": "flow"}])
def test_the_held_out_loss_repeats_for_a_seed_and_does_not_depend_on_batch_size_or_weight(
    tiny: ModelConfig, extra: dict[str, Any]
) -> None:
    model = build_model(tiny)
    config = DiffusionConfig.model_validate({"timesteps": 50, **extra})
    images = torch.randint(0, 256, (7, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    patches = patchify(images, tiny.patch_size)
    loss = denoising_loss(model, config, patches, draws=3, seed=1)
    plain = config.model_copy(update={"loss_weight": "uniform"})
    assert denoising_loss(model, plain, patches, draws=3, seed=1) == loss
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

    def denoiser(noisy: Tensor, _: Tensor | None, times: Tensor, __: Tensor | None) -> Tensor:
        seen.extend(times.tolist())
        return noisy

    denoising_loss(denoiser, DiffusionConfig(timesteps=1000), torch.zeros(10, 4, 4, dtype=torch.uint8), draws=10)
    assert sorted(t // 10 for t in seen) == list(range(100))
