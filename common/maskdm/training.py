"""One training loop, used by the server to pre-train and by each client to fine-tune.

A step is a pure function of (state, batch, seed, images seen), so a resumed run repeats an uninterrupted one.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskdm.config import DiffusionConfig, MaskConfig, TrainingConfig
from maskdm.diffusion import alphas_bar, masked_loss, to_model_range
from maskdm.errors import TrainingDiverged
from maskdm.masking import draw_visible
from maskdm.model import MaskedUViT, patchify
from maskdm.precision import autocast, pick_precision
from maskdm.seeding import generator

# Steps in a row with a non-finite gradient after which a run gives up: single ones happen, this many do not pass.
MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class TrainingState:
    """Everything a run needs to go on: raw weights, their moving average, optimiser moments, counts."""

    model: MaskedUViT
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    images_seen: int = 0
    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = field(default=0, repr=False)

    @classmethod
    def fresh(cls, model: MaskedUViT, config: TrainingConfig) -> "TrainingState":
        """Start from the model's weights; its EMA starts there too."""
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        return cls(model, optimizer, {name: p.detach().clone() for name, p in model.named_parameters()})


@dataclass(frozen=True)
class Progress:
    """What a hook sees after a step."""

    images: int
    loss: float
    lr: float
    images_per_s: float
    data_wait: float  # share of the time spent waiting for images
    skipped: int


def learning_rate(config: TrainingConfig, images_seen: int) -> float:
    """Linear warm-up over `warmup_images`, then constant (Lei et al. 2023, appendix)."""
    if images_seen >= config.warmup_images:
        return config.lr
    return config.lr * (images_seen + config.batch_size) / (config.warmup_images + config.batch_size)


def ema_decay(step: int, longest: float) -> float:
    """Decay of the moving average at a step: ramps as 1 − (1 + n)^(−2/3) up to `longest` (published recipe)."""
    return min(longest, 1 - math.pow(1 + step, -2 / 3))


def train(
    state: TrainingState,
    batches: Iterator[Tensor],
    config: TrainingConfig,
    diffusion: DiffusionConfig,
    mask: MaskConfig,
    *,
    on_step: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train until `config.images` were seen or `stop()` holds; `state` is always whole between steps.

    Args:
        batches: uint8 images, (batch, C, S, S), continuing after `state.images_seen`.

    Raises:
        TrainingDiverged: gradients stayed non-finite for MAX_SKIPPED_IN_A_ROW steps.
    """
    device = next(state.model.parameters()).device
    precision = pick_precision(config.precision, device)
    schedule = alphas_bar(diffusion).float().to(device)
    state.model.train()
    while state.images_seen < config.images and not stop():
        started = time.perf_counter()
        images = next(batches)
        loaded = time.perf_counter()
        lr = learning_rate(config, state.images_seen)
        loss = training_step(state, images.to(device), config, diffusion, mask, schedule, lr, precision)
        elapsed = time.perf_counter() - started
        rate, wait = len(images) / elapsed, (loaded - started) / elapsed
        on_step(Progress(state.images_seen, loss, lr, rate, wait, state.skipped))


def training_step(
    state: TrainingState,
    images: Tensor,
    config: TrainingConfig,
    diffusion: DiffusionConfig,
    mask: MaskConfig,
    schedule: Tensor,
    lr: float,
    precision: Literal["fp32", "bf16"],
) -> float:
    """One optimiser step on uint8 images (B, C, S, S); returns the mean loss over visible elements."""
    model, batch = state.model, len(images)
    randomness = generator("step", config.seed, state.images_seen, device=images.device)
    if config.horizontal_flip:
        flip = torch.rand(batch, 1, 1, 1, generator=randomness, device=images.device) < config.horizontal_flip
        images = torch.where(flip, images.flip(3), images)
    visible = draw_visible(mask, model.config.grid, batch, randomness)  # (B, V) or None
    patches = patchify(images, model.config.patch_size)  # (B, N, P) uint8
    if visible is not None:
        patches = patches.gather(1, visible[:, :, None].expand(-1, -1, patches.shape[2]))  # (B, V, P)
    clean = to_model_range(patches)
    timesteps = torch.randint(diffusion.timesteps, (batch,), generator=randomness, device=images.device)
    noise = torch.randn(clean.shape, generator=randomness, device=images.device)
    with autocast(images.device, precision):
        loss = masked_loss(model, diffusion, schedule, clean, visible, timesteps, noise).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    apply_gradients(state, lr, config.clip_norm, config.ema_decay)
    state.images_seen += batch
    return loss.item()


def apply_gradients(state: TrainingState, lr: float, clip_norm: float, longest_average: float) -> None:
    """Clip, step and average; a non-finite gradient changes nothing but the count of skipped steps."""
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip_norm)
    if torch.isfinite(norm):
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        state.steps += 1
        state.skipped_in_a_row = 0
        weight = 1 - ema_decay(state.steps, longest_average)
        torch._foreach_lerp_(list(state.average.values()), [p.detach() for p in state.model.parameters()], weight)
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"the gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row: "
                f"lower --lr, or use --precision fp32; the last saved state is whole"
            )
    state.optimizer.zero_grad(set_to_none=True)


def optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Moments of the optimiser by parameter name, e.g. for a resumable file."""
    found: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            found[f"{key}.{name}"] = value
    return found


def restore_optimizer(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    for name, parameter in state.model.named_parameters():
        moments: dict[str, Any] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}.{name}" in tensors:
                moments[key] = tensors[f"{key}.{name}"]
        if moments:
            state.optimizer.state[parameter] = moments
