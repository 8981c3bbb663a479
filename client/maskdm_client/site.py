"""One site's answer to one plan: measure, fine-tune on the slice, measure again, hand the result to the gate.

Knows nothing of Flower: a plan and weights come in, a parcel goes out.
"""

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from maskdm.checkpoint import first_problem, model_from, save_checkpoint
from maskdm.data.pixels import IsColour
from maskdm.data.preflight import compare
from maskdm.errors import DataError, GateRefused, MaskDMError, TrainingDiverged
from maskdm.model import Network
from maskdm.parcel import Outcome, Parcel, Report
from maskdm.precision import pick_device
from maskdm.protocol import RoundPlan
from maskdm.tensorfile import Document
from maskdm.wire import size
from maskdm_client.fine_tuning import Superseded, fine_tune, held_out_loss
from maskdm_client.gate import problem_of_size, record, release_numbers, release_outcome, release_update
from maskdm_client.local_data import LocalImages, forget_pixels, local_images
from maskdm_client.mailbox import Mailbox, note, plain
from maskdm_client.received import PlanRefused, RestMissing, forget_others, key_of, read_weights
from maskdm_client.residual import Residual
from maskdm_client.saved import Saved
from maskdm_client.settings import SiteSettings, load_settings

Say = Callable[[dict[str, Any]], None]
FULL = (errno.ENOSPC, errno.EDQUOT)


class TooLarge(MaskDMError):
    """What the plan asks for would exceed what may leave this site."""


def answer(
    document: str,
    weights: Document,
    folder: Path,
    box: Mailbox | None = None,
    exchange: int = 0,
    key: str = "",
) -> Parcel:
    """Do what the plan asks and return what may leave; a failure leaves as a code, its reason stays in `folder`.

    Args:
        box: where to leave the reply, to say how far the work is, and to look for a newer plan.
        exchange: of the request, for an answer to what is no plan.
        key: of the work, where it is known.

    Raises:
        Superseded: a newer request lies in the box; this one is not worth an answer.
        OSError: the audit log cannot be written, or the disk is full: it may be tried again.
    """
    audit, round_number = folder / "audit.jsonl", 1
    ends = kept = False
    key = key or key_of(document, weights)
    saved = Saved(folder / "work", key)

    def say(event: dict[str, Any]) -> None:
        note(folder, event)
        if box and event["event"] == "training":
            with suppress(OSError):
                box.progressed(exchange, event["round"], event["images"])

    def superseded() -> bool:
        return box is not None and box.asked() != exchange

    try:
        plan = _read_plan(document)
        if box and plan.exchange != exchange:
            raise PlanRefused("the coordinator's plan was refused: it has another number than its message")
        exchange, round_number = plan.exchange, plan.round
        received, came = read_weights(weights, plan, folder / "work" if box else None)
        record(audit, "in", round_number, Parcel(came, {}, document), plan.action)
        settings = load_settings(folder)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if plan.action == "train":
            forget_others(plan, folder / "work")
            released, event = _train(plan, received, settings, folder, saved, say, superseded)
        else:
            if plan.action == "finish":
                ends = True
                save_checkpoint(folder / "model.safetensors", received, plan.model)
                kept = True
            released, event = _measure(plan, received, settings, folder, say)
    except Superseded:
        say({"event": "superseded", "round": round_number})
        raise
    except Exception as error:
        if box and not kept and isinstance(error, OSError) and error.errno in FULL:
            raise
        outcome = _outcome(error)
        reason = str(error) if isinstance(error, MaskDMError) else plain(f"unexpected {type(error).__name__}: {error}")
        event = {"event": "failed", "round": round_number, "outcome": outcome.name, "reason": reason}
        released = release_outcome(outcome, round_number, exchange, audit)
    finally:
        if ends:
            forget_pixels(folder)
    # Only what was done well is worth sending again; a failure may have passed when the work is asked for again.
    done = released.scalars["outcome"] == Outcome.DONE
    if box:
        box.reply(exchange, key if done else "", released)
    if done:
        saved.forget()
    say({**event, "event": "finished"} if kept else event)
    return released


def _train(
    plan: RoundPlan,
    weights: dict[str, Tensor],
    settings: SiteSettings,
    folder: Path,
    saved: Saved,
    say: Say,
    superseded: Callable[[], bool],
) -> tuple[Parcel, dict[str, Any]]:
    problem = problem_of_size(size(plan.shapes(), plan.encoding, plan.topk_share), settings.policy)
    if problem:
        raise TooLarge(problem)
    model, images = _prepare(plan, weights, settings, folder, say)
    done = fine_tune(model, plan, weights, images, settings, saved, say, superseded)
    report = Report(
        round=plan.round,
        exchange=plan.exchange,
        examples=len(images.train),
        images_seen=done.images_seen,
        loss_before=done.loss_before,
        loss_after=done.loss_after,
        seconds=round(done.seconds, 3),
        skipped_steps=done.skipped_steps,
    )
    residual = Residual(folder / "work", plan)
    update = residual.added_to(done.update)
    released = release_update(update, report, plan, weights, settings.policy, folder / "audit.jsonl")
    residual.keep(update, released.arrays)
    event = {"event": "round", "rounds": plan.rounds, "bytes": released.size(), **report.model_dump(mode="json")}
    return released, event


def _measure(
    plan: RoundPlan, weights: dict[str, Tensor], settings: SiteSettings, folder: Path, say: Say
) -> tuple[Parcel, dict[str, Any]]:
    started = time.monotonic()
    model, images = _prepare(plan, weights, settings, folder, say)
    loss = held_out_loss(model, plan, images, settings)
    report = Report(
        round=plan.round,
        exchange=plan.exchange,
        examples=len(images.train),
        images_seen=0,
        loss_before=loss,
        loss_after=loss,
        seconds=round(time.monotonic() - started, 3),
        skipped_steps=0,
    )
    released = release_numbers(report, settings.policy, folder / "audit.jsonl")
    return released, {"event": "measured", "round": plan.round, "rounds": plan.rounds, "loss": loss}


def _read_plan(document: str) -> RoundPlan:
    try:
        return RoundPlan.model_validate_json(document)
    except ValidationError as error:
        raise PlanRefused(f"the coordinator's plan was refused: {plain(first_problem(error))}") from error


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


def _outcome(error: Exception) -> Outcome:
    by_kind = (
        (IsColour, Outcome.WRONG_CHANNELS),
        (DataError, Outcome.DATA_UNUSABLE),
        (TrainingDiverged, Outcome.DIVERGED),
        (GateRefused, Outcome.GATE_REFUSED),
        (PlanRefused, Outcome.PLAN_REFUSED),
        (TooLarge, Outcome.TOO_LARGE),
        (RestMissing, Outcome.UNKNOWN),
    )
    return next((outcome for kind, outcome in by_kind if isinstance(error, kind)), Outcome.FAILED)
