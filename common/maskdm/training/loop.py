"""One training loop, used by the server to pre-train and by each client to fine-tune.

A step is a pure function of (state, batch, seed, images seen), so a resumed run repeats an uninterrupted one. Nothing
in a step waits for the device; what people want to know is read from it every half a second.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import DiffusionConfig, MaskConfig, TrainingConfig
from ..data.batches import Batch
from ..diffusion.forward_process import ForwardProcess, forward_process
from ..diffusion.targets import Denoiser, masked_loss, to_model_range
from ..errors import OutOfMemory, TrainingDiverged
from ..networks.layers import patchify
from ..networks.masking import draw_visible
from ..networks.model import Network, device_of
from ..networks.precision import arithmetic, pick_precision
from ..networks.trainable import PartialNetwork
from ..seeding import generator
from .distributed import as_part_of, rank, whole

# Steps in a row with a non-finite gradient after which a run gives up: single ones happen, this many do not pass.
MAX_SKIPPED_IN_A_ROW = 20
REPORT_SECONDS = 0.5

AfterPart = Callable[[bool], None]


@dataclass
class TrainingState:
    """Everything a run needs to go on: raw weights, their moving average, optimiser moments, counts."""

    model: Network | PartialNetwork
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    skips: Tensor  # (2,) int64 on the device: steps skipped in all, and in a row until now
    images_seen: int = 0
    steps: int = 0  # of the present stage, skipped ones among them
    anchor: list[Tensor] | None = None  # of the proximal term; not saved: who goes on starts from the same model again

    @classmethod
    def fresh(cls, model: Network | PartialNetwork, config: TrainingConfig) -> "TrainingState":
        """Start from the model's weights; its EMA and the anchor of the proximal term are there too."""
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
        skips = torch.zeros(2, dtype=torch.long, device=device_of(model))
        anchor = [p.detach().clone() for p in model.parameters()] if config.proximal else None
        return cls(model, optimizer, average, skips, anchor=anchor)

    @property
    def skipped(self) -> int:
        """Steps left out because their gradient was not finite; waits for the device."""
        return int(self.skips[0])


@dataclass(frozen=True)
class Progress:
    """What a hook sees: the steps since it was last called."""

    images: int  # seen in all
    loss: float | None  # mean of the finite ones
    lr: float
    images_per_s: float
    data_wait: float  # share of the time spent waiting for images
    skipped: int


def learning_rate(config: TrainingConfig, images_seen: int) -> float:
    """Linear warm-up over `warmup_images`, then constant (Lei et al. 2023, appendix)."""
    if images_seen >= config.warmup_images:
        return config.lr
    return config.lr * (images_seen + config.batch_size) / (config.warmup_images + config.batch_size)


def ema_decay(config: TrainingConfig, step: int) -> float:
    """Decay of the moving average at a step, counted from 1.

    ramp: 1 − (1 + n)^(−2/3), at most `ema_decay` (published recipe). power: (1 − 1/n)^(γ + 1), whose average weighs
    step n as n^γ whatever the length of the run (Karras et al. 2024, arXiv 2312.02696, section 3.1); γ from
    `ema_length`.
    """
    if config.ema == "power":
        return math.pow(1 - 1 / step, power_of_length(config.ema_length) + 1)
    return min(config.ema_decay, 1 - math.pow(1 + step, -2 / 3))


@lru_cache(maxsize=4)  # asked at every step
def power_of_length(length: float) -> float:
    """γ ≥ 0 whose profile n^γ has the relative standard deviation `length`, 0 < length < 0.28.

    √((γ + 1)/((γ + 2)² (γ + 3))) = length, a cubic in γ, by bisection.
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        wide = math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > length
        low, high = (middle, high) if wide else (low, middle)
    return low


def train(
    state: TrainingState,
    batches: Iterator[Batch],
    config: TrainingConfig,
    diffusion: DiffusionConfig,
    mask: MaskConfig,
    *,
    begin: int = 0,
    denoiser: Denoiser | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    report_seconds: float = REPORT_SECONDS,
    stop: Callable[[], bool] = lambda: False,
    after_part: AfterPart = lambda done: None,
) -> None:
    """Train until `config.images` more than `begin` were seen or `stop()` holds; `state` is whole between steps.

    Args:
        batches: uint8 images (batch, C, S, S) and classes, continuing after `state.images_seen`.
        begin: images seen when this stage began.
        denoiser: what is called instead of `state.model`: the same weights, compiled or in several processes.
        after_part: called when the gradients of another of the `config.accumulate` parts of a batch were added up, with
            whether it was the last one.

    Raises:
        TrainingDiverged: gradients stayed non-finite for MAX_SKIPPED_IN_A_ROW steps.
        OutOfMemory: a step does not fit the device; names what to try.
    """
    device = device_of(state.model)
    precision = pick_precision(config.precision, device)
    process = forward_process(diffusion, device)
    state.model.train()
    state.model.recompute = config.recompute
    window = Window()
    while state.images_seen < begin + config.images and not stop():
        asked = time.perf_counter()
        images, classes = next(batches)
        waited = time.perf_counter() - asked
        lr = learning_rate(config, state.images_seen - begin)
        try:
            loss = training_step(
                state,
                denoiser or state.model,
                images,
                classes,
                config,
                diffusion,
                process,
                mask,
                lr,
                precision,
                after_part,
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"a step of {len(images)} images does not fit into the memory of {device}: try --batch-size "
                f"{max(1, config.batch_size // 2)}, --accumulate {2 * config.accumulate} or --recompute"
            ) from error
        window.add(loss, lr, config.batch_size, waited)
        if window.seconds() >= report_seconds:
            progress = window.read(state)
            window = Window()
            on_progress(progress)
    if window.steps():
        on_progress(window.read(state))


class Window:
    """The steps since the last report; losses stay on the device until they are read."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._losses: list[Tensor] = []
        self._lr = 0.0
        self._images = 0
        self._waited = 0.0

    def add(self, loss: Tensor, lr: float, images: int, waited: float) -> None:
        self._losses.append(loss)
        self._lr = lr
        self._images += images
        self._waited += waited

    def steps(self) -> int:
        return len(self._losses)

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def read(self, state: TrainingState) -> Progress:
        """Wait for the device and sum up.

        Raises:
            TrainingDiverged: too many steps in a row were skipped.
        """
        losses = torch.stack(self._losses)
        finite = losses[losses.isfinite()]
        loss = float(finite.mean()) if len(finite) else None
        skipped, in_a_row = state.skips.tolist()
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"the gradient was not finite for {in_a_row} steps in a row: lower --lr, or use --precision fp32; "
                f"the last saved state is whole"
            )
        elapsed = self.seconds()
        rate, wait = self._images / elapsed, self._waited / elapsed
        return Progress(state.images_seen, loss, self._lr, rate, wait, skipped)


def training_step(
    state: TrainingState,
    denoiser: Denoiser,
    images: Tensor,
    classes: Tensor | None,
    config: TrainingConfig,
    diffusion: DiffusionConfig,
    process: ForwardProcess,
    mask: MaskConfig,
    lr: float,
    precision: Literal["fp32", "bf16"],
    after_part: AfterPart = lambda done: None,
) -> Tensor:
    """One optimiser step on this process's share of a batch, uint8 (B, C, S, S); returns its mean loss, a scalar.

    Randomness is drawn for all B images at once, so that accumulating over parts equals one large batch.
    """
    model, device, batch = state.model, device_of(state.model), len(images)
    images = images.to(device, non_blocking=True)
    randomness = generator("step", config.seed, state.images_seen, rank(), device=device)
    if config.horizontal_flip:
        flip = torch.rand(batch, 1, 1, 1, generator=randomness, device=device) < config.horizontal_flip
        images = torch.where(flip, images.flip(3), images)
    if classes is not None:
        dropped = torch.rand(batch, generator=randomness, device=device) < config.class_dropout
        classes = classes.to(device, non_blocking=True).masked_fill(dropped, -1)
    visible = draw_visible(mask, model.config.grid, batch, randomness)  # (B, V) or None
    patches = patchify(images, model.config.patch_size)  # (B, N, P) uint8
    if visible is not None:
        patches = patches.gather(1, visible[:, :, None].expand(-1, -1, patches.shape[2]))  # (B, V, P)
    times = process.times(torch.rand(batch, generator=randomness, device=device))
    noise = torch.randn(patches.shape, generator=randomness, device=device)
    total = torch.zeros((), device=device)
    size = math.ceil(batch / config.accumulate)
    for start in range(0, batch, size):
        part = slice(start, start + size)
        with arithmetic(device, precision), gradients_stay_here(denoiser, start + size < batch):
            losses = masked_loss(
                denoiser,
                diffusion,
                process,
                to_model_range(patches[part]),
                None if visible is None else visible[part],
                times[part],
                noise[part],
                None if classes is None else classes[part],
            )
            loss = losses.sum() / batch
            loss.backward()  # type: ignore[no-untyped-call]
        after_part(start + size >= batch)
        total += loss.detach()
    apply_gradients(state, config, lr)
    state.images_seen += config.batch_size
    return total


def apply_gradients(state: TrainingState, config: TrainingConfig, lr: float) -> None:
    """Clip, step and average; after a non-finite gradient no weight changes. Does not wait for the device."""
    add_proximal_gradients(state, config.proximal)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients, foreach=True))
    bad = ~torch.isfinite(norm)
    optimizer: Any = state.optimizer
    # What PyTorch's gradient scaler tells a fused optimiser: to divide gradients as it reads them, which saves a pass
    # over them, and to leave the step out.
    optimizer.grad_scale = (norm / config.clip_norm).clamp(min=1).float()
    optimizer.found_inf = bad.float()
    for group in optimizer.param_groups:
        group.update(lr=lr, betas=config.betas, weight_decay=config.weight_decay)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.steps += 1
    state.skips.add_(bad)  # both counts, …
    state.skips[1] *= bad  # … the second of which starts anew after a good step
    weight = 1 - ema_decay(config, state.steps)
    torch._foreach_lerp_(list(state.average.values()), [p.detach() for p in state.model.parameters()], weight)


def add_proximal_gradients(state: TrainingState, strength: float) -> None:
    """Those of μ/2 ‖w − anchor‖² (FedProx, Li et al. 2020, arXiv 1812.06127, eq. 2); nothing without an anchor."""
    if not strength or state.anchor is None:
        return
    held = [(p, p.grad, at) for p, at in zip(state.model.parameters(), state.anchor, strict=True) if p.grad is not None]
    moved = torch._foreach_sub([p.detach() for p, _, _ in held], [at for _, _, at in held])
    torch._foreach_add_([gradient for _, gradient, _ in held], moved, alpha=strength)


def gradients_stay_here(denoiser: Denoiser, wanted: bool) -> AbstractContextManager[None]:
    """Keep DistributedDataParallel from averaging gradients that more will be added to."""
    if wanted and isinstance(denoiser, nn.parallel.DistributedDataParallel):
        return denoiser.no_sync()
    return nullcontext()


def put_weights(model: Network | PartialNetwork, weights: Mapping[str, Tensor]) -> None:
    """Copy weights, full or sharded like the network's, into it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(as_part_of(weights[name], parameter))


def optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Moments of the optimiser by parameter name, e.g. for a resumable file; full ones."""
    found: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            found[f"{key}.{name}"] = whole(value)
    return found


def optimizer_shapes(model: Network | PartialNetwork) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `optimizer_tensors` once every parameter had a step; full ones."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    moments = {f"{key}.{name}": shape for key in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    return moments | {f"step.{name}": () for name in shapes}


def restore_optimizer(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    for name, parameter in state.model.named_parameters():
        moments: dict[str, Any] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}.{name}" in tensors:
                moment = tensors[f"{key}.{name}"]
                moments[key] = as_part_of(moment, parameter) if moment.dim() else moment.to(parameter.device)
        if moments:
            state.optimizer.state[parameter] = moments
