"""Forward processes: how a clean image becomes noise, x_t = α_t x_0 + σ_t ε.

Three families behind one protocol. Everything else (targets, weights, samplers) sees only α and σ, so that each works
with every process.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..config import DiffusionConfig

Spacing = Literal["time", "log-snr"]

# Rectified flow ends in pure noise, α = 0, where x_0 cannot be told from ε; sampling starts just before.
FLOW_LAST_TIME = 0.999
# Even steps in λ begin here, where 0.6 % of the amplitude is signal: further out they would be spent on pure noise
# (Lu et al. 2022, arXiv 2211.01095, for the cosine schedule).
LOWEST_LOG_SNR = -5.1


class ForwardProcess(Protocol):
    """One process on one device; times are whatever the process counts in."""

    sigma_data: float  # standard deviation of the data that `v` and the input scale assume

    def times(self, quantiles: Tensor) -> Tensor:
        """Times of the training distribution from uniform numbers in [0, 1), (B,) → (B,)."""

    def level(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at times, (B,) → (B,), (B,), in at least the precision of the times."""

    def network_time(self, times: Tensor) -> Tensor:
        """What the network is told, (B,), about 0 … 1000."""

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Factor on x_t before it enters the network, (B,); None for 1."""

    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """Falling times of a sampler's evaluations, (≤ steps,), float64 or int64."""


class DiscreteProcess:
    """Variance-preserving diffusion in T steps (Ho et al. 2020, arXiv 2006.11239, eq. 4): α² = ᾱ_t, σ² = 1 − ᾱ_t."""

    sigma_data = 1.0

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self._abar = alphas_bar(config).to(device)  # float64: λ near t = 0 is ill-conditioned in fp32

    def times(self, quantiles: Tensor) -> Tensor:
        total = len(self._abar)
        return (quantiles * total).long().clamp(max=total - 1)

    def level(self, times: Tensor) -> tuple[Tensor, Tensor]:
        abar = self._abar[times]
        return abar.sqrt(), (1 - abar).sqrt()

    def network_time(self, times: Tensor) -> Tensor:
        return times

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        return None

    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """From T − 1 down to 0, evenly in t; or evenly in λ = log(α/σ) up to rounding, which may leave a few less."""
        last = len(self._abar) - 1
        steps = min(steps, last + 1)
        if steps == 1:
            return torch.tensor([last])
        if spacing == "time":
            return torch.linspace(last, 0, steps, dtype=torch.float64).round().long()
        log_snr = ((self._abar.log() - (1 - self._abar).log()) / 2).cpu()  # λ_t, falling in t
        lowest = max(float(log_snr[-1]), LOWEST_LOG_SNR)
        wanted = torch.linspace(lowest, float(log_snr[0]), steps, dtype=torch.float64)
        nearest = (log_snr[None] - wanted[:, None]).abs().argmin(dim=1)  # (steps,)
        return torch.unique(nearest).flip(0)  # type: ignore[no-any-return]


class VarianceExploding:
    """α = 1 and σ from 0.002 to 80 (Karras et al. 2022, EDM, arXiv 2206.00364): score matching on noise of any size.

    Times are σ itself. Training draws log σ from N(−1.2, 1.2²); with the target `v` and sigma_data 0.5 the network,
    its input scale and the loss are EDM's (table 1, up to the sign of the output).
    """

    sigma_min, sigma_max, rho = 0.002, 80.0, 7.0
    mean_log_sigma, std_log_sigma = -1.2, 1.2

    def __init__(self, config: DiffusionConfig) -> None:
        self.sigma_data = config.sigma_data

    def times(self, quantiles: Tensor) -> Tensor:
        normal = torch.special.ndtri(quantiles.clamp(1e-6, 1 - 1e-6))  # ±4.75 standard deviations
        logs: Tensor = self.mean_log_sigma + self.std_log_sigma * normal
        return logs.exp()

    def level(self, times: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(times), times

    def network_time(self, times: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return 1000 * (times.log() - low) / (high - low)

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        return (alpha**2 * self.sigma_data**2 + sigma**2).rsqrt()

    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """EDM's eq. 5, or evenly in log σ."""
        share = torch.linspace(0, 1, steps, dtype=torch.float64)
        if spacing == "log-snr":
            return (math.log(self.sigma_max) + share * math.log(self.sigma_min / self.sigma_max)).exp()
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas: Tensor = (high + share * (low - high)) ** self.rho
        return sigmas


class RectifiedFlow:
    """A straight line from data to noise: α = 1 − t, σ = t, t ~ U[0, 1) (Liu et al. 2022, arXiv 2209.03003)."""

    sigma_data = 1.0

    def times(self, quantiles: Tensor) -> Tensor:
        return quantiles * FLOW_LAST_TIME

    def level(self, times: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - times, times

    def network_time(self, times: Tensor) -> Tensor:
        return 1000 * times

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        return None

    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """Evenly in t from the noise to one step before the data; or evenly in λ = log((1 − t)/t)."""
        if spacing == "log-snr":
            highest = math.log(FLOW_LAST_TIME / (1 - FLOW_LAST_TIME))
            return torch.linspace(-LOWEST_LOG_SNR, -highest, steps, dtype=torch.float64).sigmoid()
        return FLOW_LAST_TIME * (1 - torch.arange(steps, dtype=torch.float64) / steps)


def forward_process(config: DiffusionConfig, device: torch.device | str = "cpu") -> ForwardProcess:
    """The process that a configuration names, with its tables on `device`."""
    if config.process == "ddpm":
        return DiscreteProcess(config, device)
    return VarianceExploding(config) if config.process == "edm" else RectifiedFlow()


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
