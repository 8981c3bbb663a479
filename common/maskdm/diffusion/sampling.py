"""Samplers: pure functions from noise to images.

Each takes `x0_at(x, i)`, the (clipped) estimate of x_0 at the i-th level, the falling noise levels (α, σ), and the
noise at the first of them. The last step always lands on x_0 itself, so no residual noise is left.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from ..config import DEFAULT_STEPS, DiffusionConfig, Sampler
from ..errors import UsageError
from ..networks.layers import patchify, unpatchify
from ..networks.model import Network, device_of
from ..networks.precision import arithmetic
from ..seeding import generator
from .forward_process import ForwardProcess, Spacing, forward_process
from .targets import Denoiser, predict, predicted_x0, to_model_range

X0At = Callable[[Tensor, int], Tensor]
Levels = Sequence[tuple[float, float]]  # (α, σ), falling noise
CLEAN = (1.0, 0.0)


def sample_ddim(x0_at: X0At, levels: Levels, x: Tensor, *, eta: float, randomness: Sequence[torch.Generator]) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16) for any α and σ.

    η = 0 is deterministic: the Euler step of the probability flow, along a straight path too. η = 1 on every timestep
    is DDPM's ancestral sampling (Ho et al. 2020, algorithm 2, with the smaller variance). Each image has a generator of
    its own, so that its noise does not depend on the others.
    """
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(_steps(levels)):
        x0 = x0_at(x, i)
        if next_sigma == 0:
            return x0
        # Variance of x_s given x_t and x_0, of which η² is drawn anew.
        forward = sigma**2 - (alpha / next_alpha * next_sigma) ** 2
        fresh = eta * math.sqrt(max(forward, 0.0)) * next_sigma / sigma
        kept = math.sqrt(max(next_sigma**2 - fresh**2, 0.0))
        x = next_alpha * x0 + kept * (x - alpha * x0) / sigma
        if fresh:
            x = x + fresh * torch.stack([_normal(image, own) for image, own in zip(x, randomness, strict=True)])
    raise AssertionError("no levels")


def sample_dpmpp_2m(x0_at: X0At, levels: Levels, x: Tensor) -> Tensor:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022, arXiv 2211.01095, algorithm 2); first-order at both ends."""
    previous: Tensor | None = None
    previous_h = 0.0
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(_steps(levels)):
        x0 = x0_at(x, i)
        if next_sigma == 0:
            return x0
        h = math.log(next_alpha / next_sigma) - math.log(alpha / sigma)  # step in λ
        data = x0
        if previous is not None:
            data = x0 + (x0 - previous) * (h / (2 * previous_h))
        x = next_sigma / sigma * x - next_alpha * math.expm1(-h) * data
        previous, previous_h = x0, h
    raise AssertionError("no levels")


def sample_heun(x0_at: X0At, levels: Levels, x: Tensor) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, arXiv 2206.00364, algorithm 1, without churn).

    Two evaluations a step, one for the last. Where α stays 1 it steps in σ, where dx/dσ = ε: EDM's own. Elsewhere σ/α
    may grow without bound, so it steps along the straight line onto which every process can be scaled: y = x/(α + σ)
    over τ = σ/(α + σ), where dy/dτ = ε − x_0; for a rectified flow that is x over t.
    """
    exploding = all(alpha == 1 for alpha, _ in levels)

    def slope(x: Tensor, x0: Tensor, alpha: float, sigma: float) -> Tensor:
        noise = (x - alpha * x0) / sigma
        return noise if exploding else noise - x0

    for i, (here, there) in enumerate(_steps(levels)):
        x0 = x0_at(x, i)
        if there == CLEAN:
            return x0
        scale, next_scale = (1.0, 1.0) if exploding else (sum(here), sum(there))
        step = there[1] / next_scale - here[1] / scale
        first = slope(x, x0, *here)
        guess = (x / scale + step * first) * next_scale
        second = slope(guess, x0_at(guess, i + 1), *there)
        x = (x / scale + step * (first + second) / 2) * next_scale
    raise AssertionError("no levels")


def run_sampler(
    sampler: Sampler,
    x0_at: X0At,
    levels: Levels,
    x: Tensor,
    *,
    eta: float,
    randomness: Sequence[torch.Generator],
) -> Tensor:
    """The named sampler from the first level to the data."""
    match sampler:
        case "dpmpp":
            return sample_dpmpp_2m(x0_at, levels, x)
        case "heun":
            return sample_heun(x0_at, levels, x)
        case "ddim":
            return sample_ddim(x0_at, levels, x, eta=eta, randomness=randomness)
        case "ddpm":
            return sample_ddim(x0_at, levels, x, eta=1.0, randomness=randomness)
        case "euler":
            return sample_ddim(x0_at, levels, x, eta=0.0, randomness=randomness)


def sampling_times(process: ForwardProcess, sampler: Sampler, steps: int) -> Tensor:
    """Falling times of the evaluations; DPM-Solver++ steps evenly in λ, in which it is of second order."""
    spacing: Spacing = "log-snr" if sampler == "dpmpp" else "time"
    return process.grid(steps, spacing)


def levels_at(process: ForwardProcess, times: Tensor) -> list[tuple[float, float]]:
    """(α, σ) at each time."""
    alpha, sigma = process.level(times)
    return list(zip(alpha.tolist(), sigma.tolist(), strict=True))


def x0_estimator(
    denoiser: Denoiser,
    config: DiffusionConfig,
    process: ForwardProcess,
    times: Tensor,
    *,
    classes: Tensor | None = None,
    guidance: float = 1.0,
) -> X0At:
    """The x_0 estimate of a denoiser over whole images in patch space, clipped to [−1, 1].

    Args:
        classes: (B,) int64, or None.
        guidance: classifier-free guidance w (Ho & Salimans 2022, arXiv 2207.12598): p = p_none + w (p_class − p_none),
            so 1 is the plain conditional model.
    """

    def x0_at(x: Tensor, i: int) -> Tensor:
        now = times[i].expand(len(x)).to(x.device)  # (B,)
        level = process.level(now)
        prediction = predict(denoiser, process, x, None, now, level, classes)
        if classes is not None and guidance != 1:
            free = predict(denoiser, process, x, None, now, level, torch.full_like(classes, -1))
            prediction = free + guidance * (prediction - free)
        return predicted_x0(config, process, prediction.to(x.dtype), x, *level).clamp(-1, 1)

    return x0_at


class Options(TypedDict, total=False):
    """How images are drawn, whatever they start from."""

    sampler: Sampler
    steps: int | None  # evaluations of the network (half of Heun's); None for the sampler's usual number
    eta: float  # of ddim
    seed: int
    classes: Tensor | None  # what to draw, (count,) int64; −1 is no class; None for an unconditional model
    guidance: float  # see x0_estimator
    batch_size: int
    precision: Literal["fp32", "bf16"]
    progress: Callable[[int], None]  # told the number of images done


def sample(model: Network, config: DiffusionConfig, count: int, **options: Unpack[Options]) -> Tensor:
    """Draw images; the same seed gives the same images whatever the batch size.

    Returns:
        uint8 images, (count, C, H, W), on the CPU.
    """
    return _draw(model, config, torch.zeros(count, *_size(model)), depth=1.0, known=None, **options)


def interpolate(
    model: Network,
    config: DiffusionConfig,
    first: Tensor,
    second: Tensor,
    count: int,
    *,
    depth: float = 0.5,
    **options: Unpack[Options],
) -> Tensor:
    """Images between two (Ho et al. 2020, section 4.3): blend them, add the same noise to each blend, remove it.

    Args:
        first, second: uint8, (C, H, W).
        depth: share of the sampler's steps that noise is added for; more departs further from a plain blend.

    Returns:
        uint8, (count, C, H, W), from the first to the second.
    """
    share = torch.linspace(0, 1, count)[:, None, None, None]
    blend = (1 - share) * to_model_range(first) + share * to_model_range(second)  # (count, C, H, W)
    return _draw(model, config, blend, depth=depth, known=None, same_noise=True, **options)


def inpaint(
    model: Network, config: DiffusionConfig, image: Tensor, hole: Tensor, count: int, **options: Unpack[Options]
) -> Tensor:
    """Fill a hole: every clean estimate keeps the known pixels, so the network draws what fits them.

    Args:
        image: uint8, (C, H, W).
        hole: bool, (H, W), true where pixels are to be drawn.

    Returns:
        uint8, (count, C, H, W), equal to the image outside of the hole.
    """
    clean = to_model_range(image).expand(count, *image.shape)
    return _draw(model, config, torch.zeros_like(clean), depth=1.0, known=(clean, ~hole), **options)


def check_steps(steps: int | None, config: DiffusionConfig, option: str = "--steps") -> None:
    """Raises UsageError where `steps` are more than the process has."""
    if steps is not None and config.process == "ddpm" and steps > config.timesteps:
        raise UsageError(f"{option} {steps} is more than the model's {config.timesteps} timesteps")


def classes_in_turn(wanted: Sequence[str] | None, names: Sequence[str], count: int) -> Tensor | None:
    """Classes to draw, (count,) int64: the wanted ones or all of `names` in turn; None for a model without classes.

    Raises:
        UsageError: the model has no such class.
    """
    for name in wanted or ():
        if name not in names:
            known = f"choose from {', '.join(names)}" if names else "the model has no classes"
            raise UsageError(f"--class {name}: {known}")
    chosen = wanted or names
    return torch.tensor([names.index(chosen[i % len(chosen)]) for i in range(count)]) if chosen else None


@torch.no_grad()
def _draw(
    model: Network,
    config: DiffusionConfig,
    clean: Tensor,
    *,
    depth: float,
    known: tuple[Tensor, Tensor] | None,
    same_noise: bool = False,
    sampler: Sampler = "dpmpp",
    steps: int | None = None,
    eta: float = 0.0,
    seed: int = 0,
    classes: Tensor | None = None,
    guidance: float = 1.0,
    batch_size: int = 64,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Noise the clean images (count, C, H, W) up to `depth` of the levels, and sample back down."""
    shape, device, count = model.config, device_of(model), len(clean)
    process = forward_process(config, device)
    times = sampling_times(process, sampler, steps or DEFAULT_STEPS[sampler])
    times = times[min(round((1 - depth) * len(times)), len(times) - 1) :]
    levels = levels_at(process, times)
    noise = torch.randn(
        1 if same_noise else count, *clean.shape[1:], generator=generator("initial noise", seed)
    ).double()
    start = levels[0][0] * clean + levels[0][1] * noise  # (count, C, H, W)
    was_training = model.training
    model.eval()
    done = []
    with arithmetic(device, precision):
        for first in range(0, count, batch_size):
            rows = slice(first, first + batch_size)
            x = patchify(start[rows].to(device), shape.patch_size)  # (B, N, P)
            x0_at = x0_estimator(
                model,
                config,
                process,
                times,
                classes=None if classes is None else classes[rows].to(device),
                guidance=guidance,
            )
            if known is not None:
                pixels = patchify(known[0][rows].to(device), shape.patch_size)
                keep = patchify(known[1].expand(1, *clean.shape[1:]).to(device), shape.patch_size)
                x0_at = keeping(x0_at, pixels, keep)
            own = [generator("sampler noise", seed, first + i, device=device) for i in range(len(x))]
            x = run_sampler(sampler, x0_at, levels, x, eta=eta, randomness=own)
            images = unpatchify(x, shape.patch_size, shape.channels)  # (B, C, H, W)
            done.append(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
            progress(min(first + batch_size, count))
    model.train(was_training)
    return torch.cat(done)


def keeping(x0_at: X0At, known: Tensor, keep: Tensor) -> X0At:
    """`x0_at` with the known values where `keep` is true."""

    def constrained(x: Tensor, i: int) -> Tensor:
        return torch.where(keep, known.to(x.dtype), x0_at(x, i))

    return constrained


def _steps(levels: Levels) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    return pairwise([*levels, CLEAN])


def _size(model: Network) -> tuple[int, int, int]:
    return model.config.channels, model.config.image_size, model.config.image_size


def _normal(like: Tensor, randomness: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=randomness, device=like.device, dtype=like.dtype)
