"""One site's answer to one plan: measure, fine-tune on the slice, measure again, hand the result to the gate.

Knows nothing of Flower: a plan and weights come in as a parcel, a parcel goes out.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from maskdm.checkpoint import expected_shapes, first_problem, model_from, save_checkpoint
from maskdm.config import MaskConfig, TrainingConfig
from maskdm.data.batches import batches, class_numbers
from maskdm.data.pixels import IsColour
from maskdm.data.preflight import compare
from maskdm.diffusion import denoising_loss
from maskdm.errors import DataError, GateRefused, MaskDMError, TrainingDiverged
from maskdm.layers import patchify
from maskdm.model import Network, device_of
from maskdm.precision import arithmetic, pick_device, pick_precision
from maskdm.protocol import Outcome, Parcel, Report, RoundPlan, from_arrays
from maskdm.runfolder import append_line
from maskdm.seeding import derive_seed
from maskdm.training import Progress, TrainingState, train
from maskdm_client.gate import record, release_numbers, release_outcome, release_update
from maskdm_client.local_data import LocalImages, forget_pixels, local_images
from maskdm_client.settings import SiteSettings, load_settings

# Enough (image, timestep, noise) draws for a held-out loss whose differences between rounds can be read.
HELD_OUT_DRAWS = 512
REPORT_SECONDS = 2.0
# The optimiser starts anew each round, so its memory must suit tens of steps, not the published 200,000.
LOCAL_BETAS = (0.9, 0.95)

Say = Callable[[dict[str, Any]], None]


class PlanRefused(MaskDMError):
    """The coordinator asked for something that this site will not or cannot do."""


def answer(parcel: Parcel, folder: Path) -> Parcel:
    """Do what the plan asks and return what may leave; a failure leaves as a code, its reason stays in `folder`."""
    audit, events = folder / "audit.jsonl", folder / "events.jsonl"

    def say(event: dict[str, Any]) -> None:
        append_line(events, {"time": time.time(), **event})

    round_number = 1
    try:
        plan = _read_plan(parcel)
        round_number = plan.round
        record(audit, "in", round_number, parcel, plan.action)
        weights = _read_weights(parcel, plan)
        settings = load_settings(folder)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if plan.action == "train":
            return _train(plan, weights, settings, folder, say)
        return _finish(plan, weights, settings, folder, say)
    except Exception as error:
        outcome = _outcome(error)
        reason = str(error) if isinstance(error, MaskDMError) else f"unexpected {type(error).__name__}: {error}"
        say({"event": "failed", "round": round_number, "outcome": outcome.name, "reason": reason})
        return release_outcome(outcome, round_number, audit)


def _train(plan: RoundPlan, weights: dict[str, Tensor], settings: SiteSettings, folder: Path, say: Say) -> Parcel:
    started = time.monotonic()
    training = TrainingConfig(
        images=plan.local_images,
        batch_size=plan.batch_size,
        lr=plan.lr,
        betas=LOCAL_BETAS,
        precision=settings.precision,
        seed=derive_seed("local work", plan.seed, plan.federation, plan.round),
    )
    model, images = _prepare(plan, weights, settings, folder, say)
    before = _held_out_loss(model, plan, images, settings)
    say({"event": "measured", "round": plan.round, "rounds": plan.rounds, "loss": before})

    def on_progress(progress: Progress) -> None:
        say({"event": "training", "round": plan.round, "images": progress.images, "of": training.images})

    state = TrainingState.fresh(model, training)
    order = batches(
        images.corpus.pixels,
        training.batch_size,
        0,
        training.seed,
        rows=images.train,
        classes=class_numbers(images.corpus, plan.model.class_names),
        device=device_of(model),
    )
    train(
        state,
        order,
        training,
        plan.model.diffusion,
        MaskConfig(kind="none"),
        on_progress=on_progress,
        report_seconds=REPORT_SECONDS,
    )
    # The moving average of the local steps is what goes up: with its ramp it averages the last quarter or so.
    update = {name: average.cpu() - weights[name] for name, average in state.average.items()}
    model.load_state_dict(state.average)
    after = _held_out_loss(model, plan, images, settings)
    report = Report(
        round=plan.round,
        examples=len(images.train),
        images_seen=state.images_seen,
        loss_before=before,
        loss_after=after,
        seconds=round(time.monotonic() - started, 3),
        skipped_steps=state.skipped,
    )
    released = release_update(update, report, weights, settings.policy, folder / "audit.jsonl")
    say({"event": "round", "rounds": plan.rounds, "bytes": released.size(), **report.model_dump(mode="json")})
    return released


def _finish(plan: RoundPlan, weights: dict[str, Tensor], settings: SiteSettings, folder: Path, say: Say) -> Parcel:
    try:
        report = _measure_last(plan, weights, settings, folder, say)
    finally:
        forget_pixels(folder)
    released = release_numbers(report, settings.policy, folder / "audit.jsonl")
    say({"event": "finished", "round": plan.round, "loss": report.loss_after})
    return released


def _measure_last(
    plan: RoundPlan, weights: dict[str, Tensor], settings: SiteSettings, folder: Path, say: Say
) -> Report:
    """Keep the final model and measure it."""
    started = time.monotonic()
    save_checkpoint(folder / "model.safetensors", weights, plan.model)
    model, images = _prepare(plan, weights, settings, folder, say)
    loss = _held_out_loss(model, plan, images, settings)
    return Report(
        round=plan.round,
        examples=len(images.train),
        images_seen=0,
        loss_before=loss,
        loss_after=loss,
        seconds=round(time.monotonic() - started, 3),
        skipped_steps=0,
    )


def _read_plan(parcel: Parcel) -> RoundPlan:
    try:
        return RoundPlan.model_validate_json(parcel.document)
    except ValidationError as error:
        raise PlanRefused(f"the coordinator's plan was refused: {first_problem(error)}") from error


def _read_weights(parcel: Parcel, plan: RoundPlan) -> dict[str, Tensor]:
    expected = expected_shapes(plan.model.model)
    found = {name: array.shape for name, array in parcel.arrays.items()}
    if found != expected or any(str(array.dtype) != "float32" for array in parcel.arrays.values()):
        raise PlanRefused("the coordinator's weights do not fit the model that the plan describes")
    weights = from_arrays(parcel.arrays)
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise PlanRefused("the coordinator's weights are not finite")
    return weights


def _prepare(
    plan: RoundPlan, weights: dict[str, Tensor], settings: SiteSettings, folder: Path, say: Say
) -> tuple[Network, LocalImages]:
    """The model on its device, and the slice."""
    shape = plan.model.model
    images = local_images(settings, folder, shape.image_size, shape.channels)
    if plan.round == 1 or plan.action == "finish":
        counts = {"train": len(images.train), "held_out": len(images.held_out)}
        say({"event": "data", "summary": images.corpus.summary(), **counts})
        for warning in compare(images.corpus, plan.model):
            say({"event": "data warning", "reason": warning})
    return model_from(weights, shape, pick_device(settings.device)), images


def _held_out_loss(model: Network, plan: RoundPlan, images: LocalImages, settings: SiteSettings) -> float:
    device = device_of(model)
    rows = torch.from_numpy(images.held_out[:HELD_OUT_DRAWS])
    patches = patchify(torch.from_numpy(images.corpus.pixels)[rows], plan.model.model.patch_size).to(device)
    classes = class_numbers(images.corpus, plan.model.class_names)
    model.eval()
    with arithmetic(device, pick_precision(settings.precision, device)):
        return denoising_loss(
            model,
            plan.model.diffusion,
            patches,
            draws=max(1, HELD_OUT_DRAWS // len(rows)),
            seed=settings.seed,
            classes=None if classes is None else classes[rows].to(device),
        )


def _outcome(error: Exception) -> Outcome:
    by_kind = (
        (IsColour, Outcome.WRONG_CHANNELS),
        (DataError, Outcome.DATA_UNUSABLE),
        (TrainingDiverged, Outcome.DIVERGED),
        (GateRefused, Outcome.GATE_REFUSED),
        (PlanRefused, Outcome.PLAN_REFUSED),
    )
    return next((outcome for kind, outcome in by_kind if isinstance(error, kind)), Outcome.FAILED)
