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

from maskdm.auditlog import AUDIT, digest_of
from maskdm.checkpoint import first_problem, model_from, save_checkpoint
from maskdm.data.pixels import IsColour
from maskdm.data.preflight import compare
from maskdm.errors import DataError, GateRefused, MaskDMError, TrainingDiverged
from maskdm.model import Network
from maskdm.parcel import Outcome, Parcel, QualityReport, Report
from maskdm.policy import SitePolicy
from maskdm.precision import pick_device
from maskdm.protocol import RoundPlan
from maskdm.runfolder import write_json
from maskdm.tensorfile import Document
from maskdm.wire import size
from maskdm_client.allowance import PolicyRefused, check_allowance, use_allowance
from maskdm_client.approval import HELD, NotApproved, check_not_denied, decision, wait_for_decision
from maskdm_client.fine_tuning import Superseded, fine_tune, held_out_loss
from maskdm_client.gate import check_numbers, check_update, code, norms, problem_of_size, record
from maskdm_client.kept import Kept, forget_others
from maskdm_client.local_data import LocalImages, forget_pixels, local_images
from maskdm_client.mailbox import Mailbox, note, plain
from maskdm_client.quality import NotEvaluated, measure_quality
from maskdm_client.received import PlanRefused, RestMissing, key_of, read_weights
from maskdm_client.residual import Residual
from maskdm_client.saved import STARTS, Saved
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
    """Do what the plan asks and return what passed the gate; a failure becomes a code, its reason stays in `folder`.

    Whoever carries the messages writes down what comes in, and lets out what is returned (`gate.release`).

    Args:
        box: where to leave the reply, to say how far the work is, and to look for a newer plan.
        exchange: of the request, for an answer to what is no plan.
        key: of the work, where it is known.

    Raises:
        Superseded: a newer request lies in the box; this one is not worth an answer.
        OSError: the audit log cannot be written, or the disk is full: it may be tried again.
    """
    round_number, ends, kept = 1, False, False
    key = key or key_of(document, weights)
    saved = Saved(folder / "work", key)

    def say(event: dict[str, Any]) -> None:
        note(folder, event)
        if box and event["event"] in ("training", "drawing"):
            with suppress(OSError):
                box.progressed(exchange, event["round"], event["images"])

    def superseded() -> bool:
        return box is not None and box.asked() != exchange

    try:
        plan = _read_plan(document)
        if box and plan.exchange != exchange:
            raise PlanRefused("the coordinator's plan was refused: it has another number than its message")
        exchange, round_number = plan.exchange, plan.round
        received, _ = read_weights(weights, plan, folder / "work" if box else None)
        settings = load_settings(folder)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if plan.action == "train":
            forget_others(plan, folder / "work")
            released, event = _train(plan, received, settings, folder, saved, key, say, superseded)
        else:
            if plan.action == "finish":
                ends = True
                save_checkpoint(folder / "model.safetensors", received, plan.model)
                kept = True
            released, event = _measure(plan, received, settings, folder, key, say, superseded)
    except Superseded:
        say({"event": "superseded", "round": round_number})
        raise
    except Exception as error:
        if box and not kept and isinstance(error, OSError) and error.errno in FULL:
            raise
        outcome = _outcome(error)
        reason = str(error) if isinstance(error, MaskDMError) else plain(f"unexpected {type(error).__name__}: {error}")
        event = {"event": "failed", "round": round_number, "outcome": outcome.name, "reason": reason}
        released = code(outcome, round_number, exchange)
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
    key: str,
    say: Say,
    superseded: Callable[[], bool],
) -> tuple[Parcel, dict[str, Any]]:
    policy, audit = settings.policy, folder / AUDIT
    problem = problem_of_size(size(plan.shapes(), plan.encoding, plan.topk_share), policy)
    if problem:
        raise TooLarge(problem)
    check_allowance(folder, key, policy)
    model, images = _prepare(plan, weights, settings, folder, say)
    moments = Kept(folder / "work", "moments", plan, wanted=plan.keep_moments)
    done = fine_tune(model, plan, weights, images, settings, saved, moments, say, superseded)
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
    released = check_update(update, report, plan, weights, policy, audit)
    if policy.approve_first_round and not decision(folder, plan.federation):
        _hold(released, plan, norms(update, plan, weights), folder, say, superseded)
    use_allowance(folder, key, policy)
    residual.keep(update, released.arrays)
    moments.keep({name: tuple(t.shape) for name, t in done.moments.items()}, lambda name: done.moments[name].cpu())
    event = {"event": "round", "rounds": plan.rounds, "bytes": released.size(), **report.model_dump(mode="json")}
    return released, event


def _measure(
    plan: RoundPlan,
    weights: dict[str, Tensor],
    settings: SiteSettings,
    folder: Path,
    key: str,
    say: Say,
    superseded: Callable[[], bool],
) -> tuple[Parcel, dict[str, Any]]:
    started = time.monotonic()
    model, images = _prepare(plan, weights, settings, folder, say)
    loss = held_out_loss(model, plan, images, settings)
    quality: dict[str, int | float] = {}
    if plan.quality:
        try:
            quality = measure_quality(model, plan, images, settings, folder, key, say, superseded)
        except (NotEvaluated, PolicyRefused) as reason:
            say({"event": "not evaluated", "round": plan.round, "reason": str(reason)})
    nine = Report(
        round=plan.round,
        exchange=plan.exchange,
        examples=len(images.train),
        images_seen=0,
        loss_before=loss,
        loss_after=loss,
        seconds=round(time.monotonic() - started, 3),
        skipped_steps=0,
    )
    report = QualityReport.model_validate(nine.model_dump() | quality)
    released = check_numbers(report, settings.policy, folder / AUDIT)
    if plan.quality and quality:
        say({"event": "evaluated", "round": plan.round, "drawn": plan.quality.images, "quality": quality})
    return released, {"event": "measured", "round": plan.round, "rounds": plan.rounds, "loss": loss}


def _hold(
    released: Parcel,
    plan: RoundPlan,
    lengths: tuple[float, float],
    folder: Path,
    say: Say,
    superseded: Callable[[], bool],
) -> None:
    """Wait until somebody at this site lets the first update of a federation leave."""
    summary = {
        **{name: getattr(plan, name) for name in ("federation", "round", "rounds", "train", "encoding")},
        **{"numbers": dict(released.scalars), "bytes": released.size(), "arrays": len(released.arrays)},
        **{"norm": lengths[0], "norm_of_model": lengths[1], "sha256": digest_of(released.arrays)},
    }
    write_json(folder / HELD, summary)
    record(folder / AUDIT, "out", plan.round, "held until somebody here approves it", released)
    say({"event": "held", "round": plan.round, "folder": str(folder)})
    (folder / "work" / STARTS).unlink(missing_ok=True)  # whoever waits has survived the work, however often it waits
    if not wait_for_decision(folder, plan.federation, superseded):
        raise Superseded


def check_policy(policy: SitePolicy, plan: RoundPlan, folder: Path) -> None:
    """See that anything of this site's images may leave for this federation.

    Raises:
        PolicyRefused, NotApproved: it may not.
    """
    if policy.require_dp:
        raise PolicyRefused(
            "the site's policy wants training with differential privacy (require-dp), which this version does not have"
        )
    if policy.approve_first_round:
        check_not_denied(folder, plan.federation)


def _read_plan(document: str) -> RoundPlan:
    try:
        return RoundPlan.model_validate_json(document)
    except ValidationError as error:
        raise PlanRefused(f"the coordinator's plan was refused: {plain(first_problem(error))}") from error


def _prepare(
    plan: RoundPlan, weights: dict[str, Tensor], settings: SiteSettings, folder: Path, say: Say
) -> tuple[Network, LocalImages]:
    """The model on its device, and the slice, where the site's policy lets it take part."""
    check_policy(settings.policy, plan, folder)
    shape = plan.model.model
    images = local_images(settings, folder, shape.image_size, shape.channels)
    problem = settings.policy.problem_of_slice(len(images.train))
    if problem:
        raise PolicyRefused(problem)
    if (plan.round == 1 and plan.action != "evaluate") or plan.action == "finish":
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
        (PolicyRefused, Outcome.POLICY),
        (NotApproved, Outcome.NOT_APPROVED),
        (PlanRefused, Outcome.PLAN_REFUSED),
        (TooLarge, Outcome.TOO_LARGE),
        (RestMissing, Outcome.UNKNOWN),
    )
    return next((outcome for kind, outcome in by_kind if isinstance(error, kind)), Outcome.FAILED)
