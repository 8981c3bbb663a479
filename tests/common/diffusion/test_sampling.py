"""Samplers against distributions whose best denoiser is known in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maskdm.config import DiffusionConfig, ModelConfig, Prediction, ProcessKind, Sampler
from maskdm.diffusion.forward_process import forward_process
from maskdm.diffusion.sampling import (
    Levels,
    X0At,
    inpaint,
    interpolate,
    levels_at,
    run_sampler,
    sample,
    sampling_times,
    x0_estimator,
)
from maskdm.diffusion.targets import implied_noise, prediction_target
from maskdm.networks.model import build_model

MEAN, STD = 0.3, 0.2
PROCESSES: tuple[ProcessKind, ...] = ("ddpm", "edm", "flow")
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "x0", "v", "velocity")
SAMPLERS: tuple[Sampler, ...] = ("dpmpp", "ddim", "heun", "euler")


def levels_of(sampler: Sampler, steps: int, **diffusion: Any) -> Levels:
    process = forward_process(DiffusionConfig.model_validate(diffusion))
    return levels_at(process, sampling_times(process, sampler, steps))


def exact_gaussian(levels: Levels) -> X0At:
    """For data N(m, s²), E[x_0 | x_t] is a straight line."""

    def x0_at(x: Tensor, i: int) -> Tensor:
        alpha, sigma = levels[i]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    return x0_at


def generators(x: Tensor) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(len(x))]


def draw(sampler: Sampler, x: Tensor, steps: int, *, eta: float = 0.0, **diffusion: Any) -> Tensor:
    """Carry standard noise to the data."""
    levels = levels_of(sampler, steps, **diffusion)
    return run_sampler(
        sampler,
        exact_gaussian(levels),
        levels,
        x * levels[0][1],
        eta=eta,
        randomness=generators(x),
    )


def moments(sampler: Sampler, steps: int, **diffusion: Any) -> tuple[float, float]:
    """Every deterministic step is affine in x, so what 0 and 1 become gives mean and standard deviation exactly."""
    low, high = draw(sampler, torch.tensor([[0.0], [1.0]], dtype=torch.float64), steps, **diffusion).flatten().tolist()
    return low, high - low


@pytest.mark.parametrize(
    "diffusion",
    [{"schedule": "linear"}, {"schedule": "cosine"}, {"process": "edm"}, {"process": "flow"}],
    ids=["linear", "cosine", "edm", "flow"],
)
@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"),
    [("dpmpp", 25, 0.01), ("heun", 25, 0.01), ("ddim", 200, 0.01), ("euler", 200, 0.01)],
)
def test_deterministic_samplers_carry_noise_onto_the_data_distribution(
    sampler: Sampler, steps: int, tolerance: float, diffusion: dict[str, Any]
) -> None:
    mean, std = moments(sampler, steps, **diffusion)
    assert mean == pytest.approx(MEAN, abs=tolerance)
    assert std == pytest.approx(STD, abs=tolerance)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_come_closer_to_the_data_distribution(sampler: Sampler, process: ProcessKind) -> None:
    errors = []
    for steps in (6, 24, 96):
        mean, std = moments(sampler, steps, process=process)
        errors.append(abs(mean - MEAN) + abs(std - STD))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("process", PROCESSES)
def test_second_order_samplers_need_fewer_evaluations_than_ddim(process: ProcessKind) -> None:
    ddim = abs(moments("ddim", 40, process=process)[1] - STD)
    assert abs(moments("heun", 20, process=process)[1] - STD) < ddim
    assert abs(moments("dpmpp", 40, process=process)[1] - STD) < ddim


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_ancestral_sampling_draws_from_the_data_distribution(sampler: Sampler, process: ProcessKind) -> None:
    noise = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = draw(sampler, noise, 250, eta=1.0, process=process)
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(drawn.std()) == pytest.approx(STD, abs=0.01)


WEIGHTS, CENTRES, WIDTH = torch.tensor([0.7, 0.3]).double(), torch.tensor([-0.6, 0.5]).double(), 0.1


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", [*SAMPLERS, "ddpm"])
def test_every_combination_reproduces_a_gaussian_mixture_whose_score_is_known(
    process: ProcessKind, prediction: Prediction, sampler: Sampler
) -> None:
    """The exact posterior mean of a mixture stands in for the network and answers in the units of the target."""
    config = DiffusionConfig(process=process, prediction=prediction)
    forward = forward_process(config)
    times = sampling_times(forward, sampler, {"ddpm": 250, "ddim": 100, "euler": 100}.get(sampler, 40))
    levels = levels_at(forward, times)
    asked = {round(float(forward.network_time(t[None])), 6): t for t in times}

    def network(x: Tensor, _: Tensor | None, told: Tensor, __: Tensor | None) -> Tensor:
        alpha, sigma = (part.double() for part in forward.level(asked[round(float(told[0]), 6)][None]))
        scale = forward.input_scale(alpha, sigma)
        noisy = x.double() if scale is None else x.double() / scale
        spread = alpha**2 * WIDTH**2 + sigma**2
        distance = noisy[..., None] - alpha * CENTRES
        chance = (WEIGHTS.log() - distance**2 / (2 * spread)).softmax(dim=-1)
        mean = (chance * (CENTRES + alpha * WIDTH**2 / spread * distance)).sum(dim=-1)
        return prediction_target(config, forward, mean, implied_noise(mean, noisy, alpha, sigma), alpha, sigma)

    noise = torch.randn(1, 4000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = run_sampler(
        sampler,
        x0_estimator(network, config, forward, times),
        levels,
        noise * levels[0][1],
        eta=0.0,
        randomness=generators(noise),
    ).flatten()
    left = drawn < 0
    assert float(left.double().mean()) == pytest.approx(0.7, abs=0.03)  # four standard errors
    for side, centre in ((left, -0.6), (~left, 0.5)):
        assert float(drawn[side].mean()) == pytest.approx(centre, abs=0.02)
        assert float(drawn[side].std()) == pytest.approx(WIDTH, abs=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_last_step_lands_on_the_clean_estimate_itself(sampler: Sampler, steps: int) -> None:
    levels = levels_of(sampler, steps, timesteps=20)
    asked: list[int] = []

    def x0_at(x: Tensor, i: int) -> Tensor:
        asked.append(i)
        return torch.full_like(x, float(i))

    x = torch.ones(1, 2, dtype=torch.float64)
    found = run_sampler(sampler, x0_at, levels, x, eta=0.0, randomness=generators(x))
    assert sorted(set(asked)) == list(range(len(levels)))
    assert len(asked) == (2 * len(levels) - 1 if sampler == "heun" else len(levels))
    assert found.tolist() == [[float(len(levels) - 1)] * 2]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_estimates_stay_in_the_range_of_pixels(process: ProcessKind, prediction: Prediction) -> None:
    config = DiffusionConfig(process=process, prediction=prediction, timesteps=20)
    forward = forward_process(config)
    x0_at = x0_estimator(lambda x, *_: 50 * x, config, forward, sampling_times(forward, "ddim", 5))
    estimate = x0_at(torch.randn(2, 3, 4, dtype=torch.float64), 0)
    assert float(estimate.abs().max()) <= 1


def test_guidance_moves_the_prediction_away_from_the_one_without_class() -> None:
    config = DiffusionConfig(prediction="x0")
    forward = forward_process(config)

    def network(x: Tensor, _: Tensor | None, __: Tensor, classes: Tensor | None) -> Tensor:
        assert classes is not None
        return (0.1 + 0.1 * classes)[:, None, None].expand(x.shape)  # class −1 gives 0

    x, times = torch.zeros(2, 1, 1), sampling_times(forward, "ddim", 5)
    for guidance, expected in ((0.0, [0.0, 0.0]), (1.0, [0.1, 0.3]), (2.0, [0.2, 0.6])):
        x0_at = x0_estimator(network, config, forward, times, classes=torch.tensor([0, 2]), guidance=guidance)
        assert x0_at(x, 0).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpmpp", 0.0), ("heun", 0.0)])
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
    first, second = draw("ddim", torch.ones(2, 3, dtype=torch.float64), 10, eta=1.0, timesteps=20)
    assert not torch.allclose(first, second)


def test_progress_is_told_and_the_mode_of_the_network_is_left_as_it_was(tiny: ModelConfig) -> None:
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


def test_filling_a_hole_leaves_everything_else_alone(tiny: ModelConfig) -> None:
    image = torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:5, 3:7] = True
    filled = inpaint(build_model(tiny), DiffusionConfig(timesteps=50), image, hole, 3, steps=6)
    assert filled.shape == (3, 1, 8, 8)
    assert (filled[:, :, ~hole] == image[:, ~hole]).all()
    assert not torch.equal(filled[0], filled[1])


def test_interpolation_ends_near_its_two_images_when_little_noise_is_added(tiny: ModelConfig) -> None:
    first, second = torch.full((1, 8, 8), 40, dtype=torch.uint8), torch.full((1, 8, 8), 200, dtype=torch.uint8)
    between = interpolate(
        build_model(tiny), DiffusionConfig(), first, second, 5, depth=0.05, sampler="ddim", steps=100
    ).float()
    brightness = between.mean(dim=(1, 2, 3))
    assert brightness.tolist() == pytest.approx([40, 80, 120, 160, 200], abs=12)


DIFFUSERS_STEPS = 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # theirs
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_samplers_equal_those_of_diffusers(sampler: Sampler, schedule: str) -> None:
    """Same timesteps, same denoiser, same noise: an independent implementation must give the same image."""
    diffusers = pytest.importorskip("diffusers")
    config = DiffusionConfig.model_validate({"schedule": schedule})
    forward = forward_process(config)
    betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    settings: dict[str, Any] = {
        "prediction_type": "sample",
        **(betas if schedule == "linear" else {"beta_schedule": "squaredcos_cap_v2"}),
    }
    if sampler == "ddim":
        theirs = diffusers.DDIMScheduler(**settings, clip_sample=False)
        theirs.set_timesteps(DIFFUSERS_STEPS)
        times = theirs.timesteps
    else:
        theirs = diffusers.DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero")
        times = sampling_times(forward, sampler, DIFFUSERS_STEPS)
        theirs.set_timesteps(timesteps=times.tolist())
    levels = levels_at(forward, times)
    x0_at = exact_gaussian(levels)
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = run_sampler(sampler, x0_at, levels, x, eta=0.0, randomness=[])
    y = x
    for i, t in enumerate(times):
        y = theirs.step(x0_at(y, i), t, y).prev_sample
    assert float((ours - y).abs().max()) < 1e-5  # theirs has tables in fp32


def test_an_edm_heun_step_is_the_one_of_algorithm_1() -> None:
    levels = [(1.0, 2.0), (1.0, 0.7)]
    x0_at = exact_gaussian(levels)
    x = torch.tensor([[1.3]], dtype=torch.float64)
    slope = (x - x0_at(x, 0)) / 2.0
    guess = x + (0.7 - 2.0) * slope
    corrected = x + (0.7 - 2.0) * (slope / 2 + (guess - x0_at(guess, 1)) / 0.7 / 2)
    expected = x0_at(corrected, 1)  # the last step lands on the clean estimate
    found = run_sampler("heun", x0_at, levels, x, eta=0.0, randomness=[])
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_an_euler_step_of_a_flow_goes_along_its_velocity() -> None:
    levels = [(0.2, 0.8), (0.5, 0.5)]
    x0_at = exact_gaussian(levels)
    x = torch.tensor([[0.9]], dtype=torch.float64)
    velocity = (x - 0.2 * x0_at(x, 0)) / 0.8 - x0_at(x, 0)
    expected = x0_at(x + (0.5 - 0.8) * velocity, 1)
    found = run_sampler("euler", x0_at, levels, x, eta=0.0, randomness=[])
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    assert math.isfinite(float(found))
