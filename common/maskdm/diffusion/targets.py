"""Prediction targets, loss weights, and masked denoising score matching.

What a network predicts is a linear mix a x_0 + b ε, so with x_t = α x_0 + σ ε every target, its clean estimate and its
weights follow from (a, b, α, σ) alone. The loss is over *visible* elements only (Lei et al. 2023, arXiv 2306.11363, eq.
6).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import DiffusionConfig
from ..seeding import generator
from .forward_process import ForwardProcess, forward_process

# What a network is called with: noisy patches (B, V, P), positions (B, V) or None, times (B,), classes (B,) or None.
Denoiser = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = α x_0 + σ ε; α and σ (B,) are broadcast over the remaining axes."""
    return _like(alpha, x0) * x0 + _like(sigma, x0) * noise


def target_mix(config: DiffusionConfig, process: ForwardProcess, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of the target a x_0 + b ε, (B,) each.

    epsilon: ε. x0: x_0. velocity: ε − x_0 (rectified flow, arXiv 2209.03003). v: (α s ε − σ/s x_0)/√(α²s² + σ²) with
    s = sigma_data; √ᾱ ε − √(1−ᾱ) x_0 where α² + σ² = 1 and s = 1 (Salimans & Ho 2022, arXiv 2202.00512), and minus
    EDM's network output where α = 1 (Karras et al. 2022, arXiv 2206.00364, table 1).
    """
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if config.prediction == "epsilon":
        return zero, one
    if config.prediction == "x0":
        return one, zero
    if config.prediction == "velocity":
        return -one, one
    scale = process.sigma_data
    norm = (alpha**2 * scale**2 + sigma**2).sqrt()
    return -sigma / scale / norm, alpha * scale / norm


def prediction_target(
    config: DiffusionConfig, process: ForwardProcess, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """What the network should output."""
    a, b = target_mix(config, process, alpha, sigma)
    return _like(a, x0) * x0 + _like(b, x0) * noise


def predicted_x0(
    config: DiffusionConfig, process: ForwardProcess, prediction: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """x_0 implied by a prediction at x_t: solve x_t = α x_0 + σ ε and p = a x_0 + b ε."""
    a, b = target_mix(config, process, alpha, sigma)
    determinant = sigma * a - alpha * b
    return _like(sigma / determinant, xt) * prediction - _like(b / determinant, xt) * xt


def implied_noise(x0: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ε that takes x_0 to x_t."""
    return (xt - _like(alpha, xt) * x0) / _like(sigma, xt)


def loss_weight(config: DiffusionConfig, process: ForwardProcess, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Factor on the squared error of the prediction, (B,), with SNR = α²/σ².

    uniform: 1. min-snr: min(SNR, γ) on the error of x_0 (Hang et al. 2023, arXiv 2303.09556, section 3.3). p2:
    1/(1 + SNR)^γ on the error of ε (Choi et al. 2022, arXiv 2204.00227, section 3.2, k = 1). Both are restated for the
    target in use.
    """
    if config.loss_weight == "uniform":
        return torch.ones_like(alpha)
    a, b = target_mix(config, process, alpha, sigma)
    determinant = sigma * a - alpha * b
    snr = (alpha / sigma) ** 2
    if config.loss_weight == "min-snr":
        return snr.clamp(max=config.min_snr_gamma) * (sigma / determinant) ** 2
    return (1 + snr) ** -config.p2_gamma * (alpha / determinant) ** 2


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0 … 255 → fp32 −1 … 1."""
    return images.float() / 127.5 - 1


def predict(
    denoiser: Denoiser,
    process: ForwardProcess,
    noisy: Tensor,
    visible: Tensor | None,
    times: Tensor,
    level: tuple[Tensor, Tensor],
    classes: Tensor | None,
) -> Tensor:
    """Call the network with its input scaled as the process wants it, (B, V, P) → (B, V, P)."""
    scale = process.input_scale(*level)
    scaled = noisy if scale is None else _like(scale, noisy) * noisy
    return denoiser(scaled.float(), visible, process.network_time(times), classes)


def masked_loss(
    denoiser: Denoiser,
    config: DiffusionConfig,
    process: ForwardProcess,
    patches: Tensor,
    visible: Tensor | None,
    times: Tensor,
    noise: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    """Masked denoising score matching, one value an image.

    Args:
        patches: clean visible patches in [−1, 1], (B, V, P).
        visible: their positions, (B, V), or None.
        times: (B,), as `process.times` draws them.
        noise: standard normal, (B, V, P).
        classes: (B,) int64, or None.

    Returns:
        Weighted mean squared error over the visible elements, (B,) fp32.
    """
    alpha, sigma = (part.float() for part in process.level(times))  # (B,)
    noisy = add_noise(patches, noise, alpha, sigma)  # (B, V, P)
    prediction = predict(denoiser, process, noisy, visible, times, (alpha, sigma), classes)  # (B, V, P)
    error = prediction.float() - prediction_target(config, process, patches, noise, alpha, sigma)
    return error.square().mean(dim=(1, 2)) * loss_weight(config, process, alpha, sigma)


def denoising_loss(
    denoiser: Denoiser,
    config: DiffusionConfig,
    patches: Tensor,
    *,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 128,
    classes: Tensor | None = None,
) -> float:
    """Mean of `denoising_losses`, which has the arguments."""
    losses = denoising_losses(denoiser, config, patches, draws=draws, seed=seed, batch_size=batch_size, classes=classes)
    return float(losses.mean())


@torch.no_grad()
def denoising_losses(
    denoiser: Denoiser,
    config: DiffusionConfig,
    patches: Tensor,
    *,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 128,
    classes: Tensor | None = None,
    largest: float = math.inf,
) -> Tensor:
    """Held-out loss of whole images, unweighted; comparable between models: same times and noise for the same seed.

    Times are stratified over the training distribution so that a few draws an image estimate the mean well.

    Args:
        patches: whole images as uint8 patches, (N, tokens, P), N ≥ 1.
        draws: (time, noise) pairs an image.
        classes: (N,) int64, or None.
        largest: what one draw may count; of a model that is of any use each lies near 1.

    Returns:
        One value an image, (N,) float64 on the CPU.
    """
    config = config.model_copy(update={"loss_weight": "uniform"})
    process = forward_process(config, patches.device)
    randomness = generator("held-out loss", seed, device="cpu")
    pairs = len(patches) * draws
    strata = (torch.arange(pairs) + torch.rand(pairs, generator=randomness)) / pairs  # (N·draws,), one in each stratum
    quantiles = strata[torch.randperm(pairs, generator=randomness)]
    totals = torch.zeros(len(patches), dtype=torch.float64)
    for start in range(0, pairs, batch_size):
        rows = torch.arange(start, min(start + batch_size, pairs)) % len(patches)  # (batch,)
        clean = to_model_range(patches[rows.to(patches.device)])
        noise = torch.randn(clean.shape, generator=randomness).to(patches.device)
        times = process.times(quantiles[start : start + batch_size].to(patches.device))
        chosen = None if classes is None else classes[rows.to(classes.device)]
        losses = masked_loss(denoiser, config, process, clean, None, times, noise, chosen)  # (batch,)
        totals.index_add_(0, rows, losses.double().clamp(max=largest).cpu())
    return totals / draws


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 1))
