"""A round's training at a site, and the measuring before and after it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm.config import MaskConfig, TrainingConfig
from maskdm.data.batches import batches, class_numbers
from maskdm.diffusion import denoising_loss
from maskdm.errors import TrainingDiverged
from maskdm.layers import patchify
from maskdm.model import Network, device_of
from maskdm.parcel import LARGEST_LOSS
from maskdm.precision import arithmetic, pick_precision
from maskdm.protocol import RoundPlan
from maskdm.seeding import derive_seed
from maskdm.trainable import PartialNetwork, load_values, partial_update
from maskdm.training import (
    Progress,
    TrainingState,
    optimizer_shapes,
    optimizer_tensors,
    put_weights,
    restore_optimizer,
    train,
)
from maskdm_client.kept import Kept
from maskdm_client.local_data import LocalImages
from maskdm_client.saved import Saved
from maskdm_client.settings import SiteSettings

# Enough (image, timestep, noise) draws for a held-out loss whose differences between rounds can be read.
HELD_OUT_DRAWS = 512
REPORT_SECONDS = 2.0
# Of the optimiser, which sees tens of steps a round: its memory must suit those, not the published 200,000.
LOCAL_BETAS = (0.9, 0.95)

Say = Callable[[dict[str, Any]], None]


class Superseded(Exception):
    """The coordinator asks for something newer; what was begun is of no use any more."""


@dataclass(frozen=True)
class Done:
    """What a round's training gave."""

    update: dict[str, Tensor]  # fp32, named and shaped as the plan asks
    moments: dict[str, Tensor]  # of the optimiser, where they are to be kept
    images_seen: int
    loss_before: float
    loss_after: float
    seconds: float
    skipped_steps: int


def fine_tune(
    model: Network,
    plan: RoundPlan,
    weights: dict[str, Tensor],
    images: LocalImages,
    settings: SiteSettings,
    saved: Saved,
    moments: Kept,
    say: Say,
    superseded: Callable[[], bool],
) -> Done:
    """Train for the images or the minutes that the plan gives, whichever end first, and measure before and after.

    Args:
        weights: those that came down, also in `model`.
        saved: what an earlier start of the same work left.
        moments: of the optimiser, from the round before; where there are none it starts anew.

    Raises:
        Superseded: it said so between two steps.
        TrainingDiverged: no gradient was finite, or the loss is beyond all bounds.
    """
    started = time.monotonic()
    training = TrainingConfig(
        images=plan.local_images,
        batch_size=plan.batch_size,
        lr=plan.lr,
        betas=LOCAL_BETAS,
        precision=settings.precision,
        proximal=plan.proximal,
        seed=derive_seed("local work", plan.seed, plan.federation, plan.round),
    )
    rank, seed = plan.adapter_rank, training.seed
    learner = model if plan.train == "all" else PartialNetwork(model, plan.train, rank, seed)
    state = TrainingState.fresh(learner, training)
    resumed = saved.restore(state)
    if not resumed:
        restore_optimizer(state, moments.before(optimizer_shapes(learner)))
    before, spent = resumed or (held_out_loss(model, plan, images, settings), 0.0)
    say({"event": "measured", "round": plan.round, "rounds": plan.rounds, "loss": before, "images": state.images_seen})

    def seconds() -> float:
        return spent + time.monotonic() - started

    def on_progress(progress: Progress) -> None:
        say({"event": "training", "round": plan.round, "images": progress.images, "of": training.images})
        saved.keep(state, training, before, seconds())

    order = batches(
        images.corpus.pixels,
        training.batch_size,
        state.images_seen,
        training.seed,
        rows=images.train,
        classes=class_numbers(images.corpus, plan.model.class_names),
        device=device_of(learner),
    )
    limit = 60 * plan.local_minutes if plan.local_minutes else float("inf")
    train(
        state,
        order,
        training,
        plan.model.diffusion,
        MaskConfig(kind="none"),
        on_progress=on_progress,
        report_seconds=REPORT_SECONDS,
        stop=lambda: superseded() or (seconds() >= limit and state.images_seen > 0),
    )
    if superseded():
        raise Superseded
    if state.skipped >= state.steps:
        raise TrainingDiverged(f"the gradient was not finite in any of {state.steps} steps: try --precision fp32")
    # The moving average of the local steps is what goes up: with its ramp it averages the last quarter or so.
    if isinstance(learner, PartialNetwork):
        update = {name: tensor.cpu() for name, tensor in partial_update(learner, state.average).items()}
        load_values(learner, state.average)
    else:
        update = {name: average.cpu() - weights[name] for name, average in state.average.items()}
        put_weights(learner, state.average)
    after = held_out_loss(learner, plan, images, settings)
    left = optimizer_tensors(state) if moments.wanted else {}  # else they need not outlive the training
    return Done(update, left, state.images_seen, before, after, seconds(), state.skipped)


def held_out_loss(
    model: Network | PartialNetwork, plan: RoundPlan, images: LocalImages, settings: SiteSettings
) -> float:
    """Denoising loss of the whole images that are held out, by the same draws in every round.

    Raises:
        TrainingDiverged: it is not finite, or beyond what anybody would take for a loss.
    """
    device = device_of(model)
    rows = torch.from_numpy(images.held_out[:HELD_OUT_DRAWS])
    patches = patchify(torch.from_numpy(images.corpus.pixels)[rows], plan.model.model.patch_size).to(device)
    classes = class_numbers(images.corpus, plan.model.class_names)
    model.eval()
    with arithmetic(device, pick_precision(settings.precision, device)):
        loss = denoising_loss(
            model,
            plan.model.diffusion,
            patches,
            draws=max(1, HELD_OUT_DRAWS // len(rows)),
            seed=settings.seed,
            classes=None if classes is None else classes[rows].to(device),
        )
    if not loss <= LARGEST_LOSS:  # nor where it is no number
        raise TrainingDiverged(f"the held-out loss is {loss:g}: the model is of no use, or try --precision fp32")
    return loss
