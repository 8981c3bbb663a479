"""A round's training at a site, and the measuring before and after it."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maskdm.config import MaskConfig, TrainingConfig
from maskdm.data.batches import batches, class_numbers
from maskdm.diffusion.targets import denoising_losses
from maskdm.errors import GateRefused, TrainingDiverged
from maskdm.federated.parcel import LARGEST_LOSS
from maskdm.networks.layers import patchify
from maskdm.networks.model import Network, device_of
from maskdm.networks.precision import arithmetic, pick_precision
from maskdm.networks.trainable import PartialNetwork, load_values, partial_update
from maskdm.training.loop import (
    Progress,
    TrainingState,
    optimizer_shapes,
    optimizer_tensors,
    put_weights,
    restore_optimizer,
    train,
)

from ..folder.carried_over import CarriedOver
from ..folder.events import LossMeasured, TrainingGoesOn
from ..folder.job import Job
from ..folder.unfinished import Resumed, UnfinishedWork
from ..refusals import Superseded
from .concentration import HALVES, Concentration, without_faint
from .local_data import LocalImages

# So many images at most, and at least so many (image, timestep, noise) draws, for a held-out loss. Other rounds have
# other draws: their losses differ by 1 or 2 % for that, which is less than what a round mostly changes.
HELD_OUT_IMAGES, HELD_OUT_DRAWS = 128, 1024
STANDS_OUT, FEW = 10.0, 16  # standard deviations of the others, which are all but one in sixteen
REPORT_SECONDS = 2.0
# Of the optimiser, which sees tens of steps a round: its memory must suit those, not the published 200,000.
LOCAL_BETAS = (0.9, 0.95)
# So small that a step shows of each gradient little more than its sign: where ε outweighs a gradient, the step is
# proportional to it, and an image that was made to arrive there could be read off (see `without_faint`).
LOCAL_EPSILON = 1e-20


class HeldOut(NamedTuple):
    """How well a model fits the images that are held out."""

    loss: float
    one_stands_out: bool = False  # then the loss is that image's affair, and stays here


@dataclass(frozen=True)
class Done:
    """What a round's training gave."""

    update: dict[str, Tensor]  # fp32, named and shaped as the plan asks
    moments: dict[str, Tensor]  # of the optimiser, where they are to be kept
    images_seen: int
    before: HeldOut
    after: HeldOut
    seconds: float
    skipped_steps: int


def fine_tune(
    model: Network,
    job: Job,
    weights: dict[str, Tensor],
    images: LocalImages,
    saved: UnfinishedWork,
    moments: CarriedOver,
) -> Done:
    """Train for the images or the minutes that the plan gives, whichever end first, and measure before and after.

    Minutes end nothing before the update is made of as many images and steps as the site's policy wants.

    Args:
        weights: those that came down, also in `model`.
        saved: what an earlier start of the same work left.
        moments: of the optimiser, from the round before; where there are none it starts anew.

    Raises:
        Superseded: it is, between two steps.
        TrainingDiverged: no gradient was finite.
        GateRefused: the update is made of a few images alone.
    """
    started, plan, policy = time.monotonic(), job.plan, job.settings.policy
    training = TrainingConfig(
        images=plan.local_images,
        batch_size=plan.batch_size,
        lr=plan.lr,
        betas=LOCAL_BETAS,
        epsilon=LOCAL_EPSILON,
        precision=job.settings.precision,
        proximal=plan.proximal,
        accumulate=HALVES,
        seed=job.seed("local work"),
    )
    rank, seed = plan.adapter_rank, training.seed
    learner = model if plan.train == "all" else PartialNetwork(model, plan.train, rank, seed)
    state = TrainingState.fresh(learner, training)
    concentration = Concentration(learner.named_parameters())
    resumed = saved.restore(state, concentration.tensors())
    if resumed:
        concentration.restore(resumed.halves)
    else:
        restore_optimizer(state, moments.before(optimizer_shapes(learner)))
    before = HeldOut(*resumed[:2]) if resumed else held_out_loss(model, job, images)
    spent = resumed.seconds if resumed else 0.0
    job.say(LossMeasured(loss=before.loss, round=plan.round, rounds=plan.rounds, images=state.images_seen))

    def seconds() -> float:
        return spent + time.monotonic() - started

    def on_progress(progress: Progress) -> None:
        job.say(TrainingGoesOn(round=plan.round, images=progress.images, of=training.images))
        saved.keep(state, training, Resumed(*before, seconds(), concentration.tensors()))

    order = batches(
        images.corpus.pixels,
        training.batch_size,
        state.images_seen,
        training.seed,
        rows=images.train,
        classes=classes_of(images, job),
        device=device_of(learner),
    )
    limit = 60 * plan.local_minutes if plan.local_minutes else float("inf")

    def is_over() -> bool:
        enough = state.images_seen and not policy.problem_of_work(state.images_seen, plan.batch_size)
        return job.superseded() or bool(seconds() >= limit and enough)

    def looked_at(done: bool) -> None:
        concentration.look(done)
        if done:
            without_faint(learner.parameters())

    train(
        state,
        order,
        training,
        plan.model.diffusion,
        MaskConfig(kind="none"),
        on_progress=on_progress,
        report_seconds=REPORT_SECONDS,
        stop=is_over,
        after_part=looked_at,
    )
    if job.superseded():
        raise Superseded
    if state.skipped >= state.steps:
        raise TrainingDiverged(f"the gradient was not finite in any of {state.steps} steps: try --precision fp32")
    if problem := concentration.problem(state.images_seen):
        raise GateRefused(f"the update was kept here: {problem}, which no honest model does")
    # The moving average of the local steps is what goes up: with its ramp it averages the last quarter or so.
    if isinstance(learner, PartialNetwork):
        update = {name: tensor.cpu() for name, tensor in partial_update(learner, state.average).items()}
        load_values(learner, state.average)
    else:
        update = {name: average.cpu() - weights[name] for name, average in state.average.items()}
        put_weights(learner, state.average)
    after = held_out_loss(learner, job, images)
    left = optimizer_tensors(state) if moments.wanted else {}  # else they need not outlive the training
    return Done(update, left, state.images_seen, before, after, seconds(), state.skipped)


def held_out_loss(model: Network | PartialNetwork, job: Job, images: LocalImages) -> HeldOut:
    """Denoising loss of the whole images that are held out, by draws of the site's own: the same before and after a
    round's training, so that their difference is the training's, and other ones for every other question.

    Raises:
        TrainingDiverged: it is no number.
    """
    device, plan = device_of(model), job.plan
    rows = torch.from_numpy(images.held_out[:HELD_OUT_IMAGES])
    patches = patchify(torch.from_numpy(images.corpus.pixels)[rows], plan.model.model.patch_size).to(device)
    classes = classes_of(images, job)
    model.eval()
    with arithmetic(device, pick_precision(job.settings.precision, device)):
        losses = denoising_losses(
            model,
            plan.model.diffusion,
            patches,
            draws=-(-HELD_OUT_DRAWS // len(rows)),
            seed=job.seed("held out"),
            classes=None if classes is None else classes[rows].to(device),
            largest=LARGEST_LOSS,
        )
    if not losses.isfinite().all():
        raise TrainingDiverged("the held-out loss is no number: the model is of no use, or try --precision fp32")
    return HeldOut(float(losses.mean()), one_stands_out(losses))


def one_stands_out(losses: Tensor) -> bool:
    """Whether the losses of a few images, of (N,), are so unlike those of the others that their mean tells of these.

    Models that are made to ask about one image give all others much the same loss.
    """
    few = max(1, len(losses) // FEW)
    order = (losses - losses.median()).abs().argsort(descending=True)
    odd, others = losses[order[:few]], losses[order[few:]]
    if len(others) < 2:
        return True
    return bool(((odd - others.mean()).abs() > STANDS_OUT * others.std()).any())


def classes_of(images: LocalImages, job: Job) -> Tensor | None:
    """Classes of all images, (N,) int64, −1 where the site's policy does not share the label, or too few images that
    are trained on have it; None for a model without classes.
    """
    policy = job.settings.policy
    numbers = class_numbers(images.corpus, job.plan.model.class_names)
    if numbers is None:
        return None
    trained = numbers[torch.from_numpy(images.train)]
    for number, name in enumerate(job.plan.model.class_names):
        if name not in policy.share_labels or int((trained == number).sum()) < policy.min_images:
            numbers[numbers == number] = -1
    return numbers
