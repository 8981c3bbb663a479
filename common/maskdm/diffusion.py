"""The forward process and masked denoising score matching.

x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε  (Ho et al. 2020, arXiv 2006.11239, eq. 4), images in [−1, 1], t in 0 … T−1. The loss is
the mean squared error over *visible* elements only (Lei et al. 2023, arXiv 2306.11363, eq. 6).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskdm.config import DiffusionConfig
from maskdm.seeding import generator

# What the network is called with: noisy patches (B, V, P), positions (B, V) or None, timesteps (B,) → (B, V, P).
Denoiser = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def alphas_bar(config: DiffusionConfig) -> Tensor:
    """ᾱ_t for t = 0 … T−1, float64, strictly decreasing in (0, 1)."""
    steps = config.timesteps
    if config.schedule == "linear":  # Ho et al. 2020, section 4, rescaled for T ≠ 1000
        scale = 1000 / steps
        betas = torch.linspace(scale * 1e-4, min(scale * 0.02, 0.999), steps, dtype=torch.float64)
    else:  # Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17, s = 0.008
        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(0, 0.999)
    return torch.cumprod(1 - betas, dim=0)


def add_noise(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_t from x_0; `abar` (B,) is broadcast over the remaining axes."""
    a = _like(abar, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def prediction_target(config: DiffusionConfig, x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """What the network should output: ε, x_0, or v = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022, arXiv 2202.00512)."""
    if config.prediction == "epsilon":
        return noise
    if config.prediction == "x0":
        return x0
    a = _like(abar, x0)
    return a.sqrt() * noise - (1 - a).sqrt() * x0


def predicted_x0(config: DiffusionConfig, prediction: Tensor, xt: Tensor, abar: Tensor) -> Tensor:
    """x_0 implied by a prediction at x_t."""
    a = _like(abar, xt)
    if config.prediction == "epsilon":
        return (xt - (1 - a).sqrt() * prediction) / a.sqrt()
    if config.prediction == "x0":
        return prediction
    return a.sqrt() * xt - (1 - a).sqrt() * prediction


def implied_noise(x0: Tensor, xt: Tensor, abar: Tensor) -> Tensor:
    """ε that takes x_0 to x_t."""
    a = _like(abar, xt)
    return (xt - a.sqrt() * x0) / (1 - a).sqrt()


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0 … 255 → fp32 −1 … 1."""
    return images.float() / 127.5 - 1


def masked_loss(
    denoiser: Denoiser,
    config: DiffusionConfig,
    schedule: Tensor,
    patches: Tensor,
    visible: Tensor | None,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """Masked denoising score matching, one value an image.

    Args:
        schedule: ᾱ, (T,) fp32 on the device of the patches.
        patches: clean visible patches in [−1, 1], (B, V, P).
        visible: their positions, (B, V), or None.
        timesteps: (B,) int64.
        noise: standard normal, (B, V, P).

    Returns:
        Mean squared error over the visible elements, (B,) fp32.
    """
    abar = schedule[timesteps]  # (B,)
    prediction = denoiser(add_noise(patches, noise, abar), visible, timesteps)  # (B, V, P)
    error = prediction.float() - prediction_target(config, patches, noise, abar)
    return error.square().mean(dim=(1, 2))


@torch.no_grad()
def denoising_loss(
    denoiser: Denoiser,
    config: DiffusionConfig,
    patches: Tensor,
    *,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 128,
) -> float:
    """Held-out loss over whole images, comparable between models: same timesteps and noise for the same seed.

    Timesteps are stratified over 0 … T−1 so that a few draws an image estimate the mean well.

    Args:
        patches: whole images as uint8 patches, (N, tokens, P), N ≥ 1.
        draws: (timestep, noise) pairs an image.
    """
    schedule = alphas_bar(config).float().to(patches.device)
    randomness = generator("held-out loss", seed, device="cpu")
    pairs = len(patches) * draws
    strata = (torch.arange(pairs) + torch.rand(pairs, generator=randomness)) / pairs  # (N·draws,), one in each stratum
    timesteps = (strata * config.timesteps).long()[torch.randperm(pairs, generator=randomness)]
    total = 0.0
    for start in range(0, pairs, batch_size):
        rows = torch.arange(start, min(start + batch_size, pairs)) % len(patches)
        clean = to_model_range(patches[rows.to(patches.device)])
        noise = torch.randn(clean.shape, generator=randomness).to(patches.device)
        steps = timesteps[start : start + batch_size].to(patches.device)
        total += masked_loss(denoiser, config, schedule, clean, None, steps, noise).double().sum().item()
    return total / pairs


def _like(abar: Tensor, x: Tensor) -> Tensor:
    return abar.view(-1, *[1] * (x.dim() - 1))
