"""Samplers: pure functions from noise to images.

Each takes a function `x0_at(x, t)` that gives the (clipped) estimate of x_0, the schedule ᾱ of the checkpoint and the
initial noise. The last step always lands on x_0 itself, so no residual noise is left.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from maskdm.config import DiffusionConfig
from maskdm.diffusion import Denoiser, alphas_bar, implied_noise, predicted_x0
from maskdm.model import MaskedUViT, patchify, unpatchify
from maskdm.precision import autocast
from maskdm.seeding import generator

Sampler = Literal["dpmpp", "ddim"]
DEFAULT_STEPS: dict[Sampler, int] = {"dpmpp": 25, "ddim": 100}

X0At = Callable[[Tensor, int], Tensor]


def timestep_grid(total: int, steps: int) -> list[int]:
    """`steps` distinct timesteps from total − 1 down to 0 (inclusive where steps > 1), evenly spaced."""
    assert 1 <= steps <= total
    if steps == 1:
        return [total - 1]
    return [round(t) for t in torch.linspace(total - 1, 0, steps, dtype=torch.float64).tolist()]


def sample_ddim(
    x0_at: X0At, schedule: Tensor, x: Tensor, steps: int, *, eta: float, randomness: Sequence[torch.Generator]
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16); η = 0 is deterministic, η = 1 ancestral.

    Each image has a generator of its own, so that its noise does not depend on the others.
    """
    grid = timestep_grid(len(schedule), steps)
    for t, following in zip(grid, [*grid[1:], None], strict=True):
        x0 = x0_at(x, t)
        if following is None:
            return x0
        now, after = schedule[t], schedule[following]
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        noise = torch.stack([_normal(image, own) for image, own in zip(x, randomness, strict=True)]) if eta else 0.0
        direction = (1 - after - sigma**2).clamp(min=0).sqrt() * implied_noise(x0, x, now[None])
        x = after.sqrt() * x0 + direction + sigma * noise
    raise AssertionError("unreachable")


def sample_dpmpp_2m(x0_at: X0At, schedule: Tensor, x: Tensor, steps: int) -> Tensor:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022, arXiv 2211.01095, algorithm 2); first-order first and last."""
    grid = timestep_grid(len(schedule), steps)
    alpha, sigma = schedule.sqrt(), (1 - schedule).sqrt()
    log_snr = (alpha / sigma).log()  # λ_t
    previous: Tensor | None = None
    for i, t in enumerate(grid):
        x0 = x0_at(x, t)
        if i == len(grid) - 1:
            return x0
        s = grid[i + 1]
        h = log_snr[s] - log_snr[t]
        data = x0
        if previous is not None and i < len(grid) - 2:
            r = (log_snr[t] - log_snr[grid[i - 1]]) / h
            data = x0 + (x0 - previous) / (2 * r)
        x = sigma[s] / sigma[t] * x - alpha[s] * torch.expm1(-h) * data
        previous = x0
    raise AssertionError("unreachable")


def x0_estimator(denoiser: Denoiser, config: DiffusionConfig, schedule: Tensor) -> X0At:
    """The x_0 estimate of a denoiser over whole images in patch space, clipped to [−1, 1]."""

    def x0_at(x: Tensor, t: int) -> Tensor:
        timesteps = torch.full((len(x),), t, device=x.device)
        prediction = denoiser(x.float(), None, timesteps).to(x.dtype)
        return predicted_x0(config, prediction, x, schedule[t][None]).clamp(-1, 1)

    return x0_at


@torch.no_grad()
def sample(
    model: MaskedUViT,
    config: DiffusionConfig,
    count: int,
    *,
    sampler: Sampler = "dpmpp",
    steps: int | None = None,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Draw images; the same seed gives the same images whatever the batch size.

    Returns:
        uint8 images, (count, C, H, W), on the CPU.
    """
    shape = model.config
    device = next(model.parameters()).device
    schedule = alphas_bar(config).to(device)  # float64: λ near t = 0 is ill-conditioned in fp32
    steps = min(steps or DEFAULT_STEPS[sampler], config.timesteps)
    size = (count, shape.channels, shape.image_size, shape.image_size)
    noise = torch.randn(size, generator=generator("initial noise", seed), dtype=torch.float64)
    was_training = model.training
    model.eval()
    done = []
    with autocast(device, precision):
        x0_at = x0_estimator(model, config, schedule)
        for start in range(0, count, batch_size):
            x = patchify(noise[start : start + batch_size].to(device), shape.patch_size)  # (B, N, P)
            if sampler == "ddim":
                own = [generator("ddim noise", seed, start + i, device=device) for i in range(len(x))]
                x = sample_ddim(x0_at, schedule, x, steps, eta=eta, randomness=own)
            else:
                x = sample_dpmpp_2m(x0_at, schedule, x, steps)
            images = unpatchify(x, shape.patch_size, shape.channels)  # (B, C, H, W)
            done.append(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
            progress(min(start + batch_size, count))
    model.train(was_training)
    return torch.cat(done)


def _normal(like: Tensor, randomness: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=randomness, device=like.device, dtype=like.dtype)
