"""One site's answer to one plan: measure, fine-tune on the slice, measure again, hand the result to the gate.

Knows nothing of Flower: a plan and weights come in, a parcel goes out.
"""

import errno
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskdm.data.preparation.preflight import compare
from maskdm.errors import MaskDMError
from maskdm.federated.auditlog import AUDIT
from maskdm.federated.encoding import size
from maskdm.federated.parcel import Outcome, Parcel, QualityReport, Report, rounded
from maskdm.federated.plan import RoundPlan
from maskdm.federated.terms import terms_of
from maskdm.networks.model import Network
from maskdm.networks.precision import pick_device
from maskdm.run.events import Event
from maskdm.run.runfolder import write_json
from maskdm.run.tensorfile import Document, digest_of
from maskdm.training.checkpoint import model_from, save_checkpoint

from ..folder import events
from ..folder.carried_over import CarriedOver, forget_others
from ..folder.events import note
from ..folder.failures import unexpected
from ..folder.job import Job
from ..folder.mailbox import Mailbox
from ..folder.settings import SiteSettings, load_settings
from ..folder.unfinished import STARTS, UnfinishedWork
from ..gate.allowance import FAILURES, MEASUREMENTS, UPDATES, check_allowance, use_allowance
from ..gate.approval import HELD, agree, decision, wait_for_decision
from ..gate.gate import check_numbers, check_update, code, norms, problem_of_size, record
from ..refusals import (
    OF_THE_PLAN,
    NotApproved,
    NotEvaluated,
    PlanRefused,
    PolicyRefused,
    Superseded,
    TooLarge,
    outcome_for,
)
from .fine_tuning import HeldOut, fine_tune, held_out_loss
from .local_data import LocalImages, forget_pixels, local_images
from .plausible import check_weights
from .quality import measure_quality
from .residual import Residual
from .weights import PlanWithWeights, read_weights

FULL = (errno.ENOSPC, errno.EDQUOT)


def answer(came: PlanWithWeights, folder: Path, box: Mailbox | None = None, exchange: int = 0) -> Parcel:
    """Do what the plan asks and return what passed the gate; a failure becomes a code, its reason stays in `folder`.

    Whoever carries the messages writes down what comes in, and lets out what is returned (`gate.release`).

    Args:
        box: where to leave the reply, to say how far the work is, and to look for a newer plan.
        exchange: of the request, for an answer to what is no plan.

    Raises:
        Superseded: a newer request lies in the box; this one is not worth an answer.
        OSError: the audit log cannot be written, or the disk is full: it may be tried again.
    """
    round_number, ends, kept = 1, False, False
    event: events.RoundAnswered | events.LossMeasured | events.WorkFailed
    job: Job | None = None

    def say(event: Event) -> None:
        note(folder, event)
        if box and isinstance(event, events.TrainingGoesOn | events.DrawingGoesOn) and job and not _is_undecided(job):
            with suppress(OSError):
                box.progressed(exchange, event.round, event.images)

    def superseded() -> bool:
        return box is not None and box.asked() != exchange

    try:
        plan = came.plan
        if box and plan.exchange != exchange:
            raise PlanRefused("the coordinator's plan was refused: it has another number than its message")
        exchange, round_number = plan.exchange, plan.round
        received = read_weights(came, folder / "work" if box else None)
        whole = came.key_of(received)
        job = Job(plan, whole, load_settings(folder), folder, say, superseded)
        saved = UnfinishedWork(folder / "work", whole)
        if job.settings.threads:
            torch.set_num_threads(job.settings.threads)
        if plan.action == "finish":
            ends = True
            save_checkpoint(folder / "model.safetensors", received, plan.model)
            kept = True
        released, event = _work(job, received, came.packed, saved)
    except Superseded:
        say(events.WorkSuperseded(round=round_number))
        raise
    except Exception as error:
        if box and not kept and isinstance(error, OSError) and error.errno in FULL:
            raise
        outcome = outcome_for(error)
        reason = str(error) if isinstance(error, MaskDMError) else unexpected(folder, error)
        event = events.WorkFailed(round=round_number, outcome=outcome.name, reason=reason)
        released = code(outcome, round_number, exchange)
    if ends:  # and is not tried again, which would need them
        forget_pixels(folder)
    # Only what was done well is worth sending again; a failure may have passed when the work is asked for again.
    done = released.scalars["outcome"] == Outcome.DONE
    if box:
        box.reply(exchange, came.key if done else "", released)
    if done and job:
        UnfinishedWork(folder / "work", job.key).forget()
    say(events.SiteFinished(**event.model_dump(exclude={"event"}, exclude_unset=True)) if kept else event)
    return released


def _work(
    job: Job, weights: dict[str, Tensor], packed: Document, saved: UnfinishedWork
) -> tuple[Parcel, events.RoundAnswered | events.LossMeasured]:
    """Train or measure; what a failure tells of the images waits for approval like everything else."""
    _begin(job, weights, packed)
    try:
        return _train(job, weights, saved) if job.plan.action == "train" else _measure(job, weights)
    except OF_THE_PLAN:
        raise
    except Exception as error:
        if _is_undecided(job):
            _hold(job, code(outcome_for(error), job.plan.round, job.plan.exchange))
        use_allowance(job, FAILURES)
        raise


def _train(job: Job, weights: dict[str, Tensor], saved: UnfinishedWork) -> tuple[Parcel, events.RoundAnswered]:
    plan, policy, work = job.plan, job.settings.policy, job.folder / "work"
    problem = problem_of_size(size(plan.shapes(), plan.encoding, plan.topk_share), policy)
    if problem:
        raise TooLarge(problem)
    model, images = _prepare(job, weights)
    moments = CarriedOver(work, "moments", plan, wanted=plan.keep_moments and policy.kept_moments)
    done = fine_tune(model, job, weights, images, saved, moments)
    report = _report(job, images, done.before, done.after, done.images_seen, done.seconds, done.skipped_steps)
    residual = Residual(work, plan)
    update = residual.added_to(done.update)
    released = check_update(update, report, plan, weights, policy, job.folder / AUDIT)
    if _is_undecided(job):
        _hold(job, released, norms(update, plan, weights))
    use_allowance(job, UPDATES)  # of what was approved only now; counted before, it counts once
    forget_others(plan, work)
    residual.keep(update, released.arrays)
    moments.keep({name: tuple(t.shape) for name, t in done.moments.items()}, lambda name: done.moments[name].cpu())
    told = report.model_dump() | {"loss_before": done.before.loss, "loss_after": done.after.loss}
    return released, events.RoundAnswered(rounds=plan.rounds, bytes=released.size(), **told)


def _measure(job: Job, weights: dict[str, Tensor]) -> tuple[Parcel, events.LossMeasured]:
    started, plan = time.monotonic(), job.plan
    model, images = _prepare(job, weights)
    found = held_out_loss(model, job, images)
    quality: dict[str, int | float] = {}
    if plan.quality:
        try:
            quality = measure_quality(model, job, images)
        except (NotEvaluated, PolicyRefused) as reason:
            job.say(events.QualityWithheld(round=plan.round, reason=str(reason)))
    nine = _report(job, images, found, found, 0, time.monotonic() - started, 0)
    report = QualityReport.model_validate(nine.model_dump() | quality)
    released = check_numbers(report, job.settings.policy, job.folder / AUDIT)
    if plan.quality and quality:
        job.say(events.QualityMeasured(round=plan.round, drawn=plan.quality.images, quality=quality))
    return released, events.LossMeasured(loss=found.loss, round=plan.round, rounds=plan.rounds)


def _report(
    job: Job,
    images: LocalImages,
    before: HeldOut,
    after: HeldOut,
    images_seen: int,
    seconds: float,
    skipped_steps: int,
) -> Report:
    """The numbers that go out, rounded; losses of few images, of one image, or that the site keeps, are not there."""
    policy = job.settings.policy
    tells = policy.share_loss and len(images.held_out) >= policy.min_held_out
    if before.one_stands_out or after.one_stands_out:
        tells = False
        job.say(events.LossWithheld(round=job.plan.round))
    return Report(
        round=job.plan.round,
        exchange=job.plan.exchange,
        examples=int(rounded(len(images.train))),
        images_seen=images_seen,
        loss_before=rounded(before.loss) if tells else None,
        loss_after=rounded(after.loss) if tells else None,
        seconds=rounded(seconds),
        skipped_steps=skipped_steps if tells else min(1, skipped_steps),  # some overflow only where an image is bright
    )


def _is_undecided(job: Job) -> bool:
    """Whether a person is still to say that something may leave."""
    return job.settings.policy.approve_first_round and decision(job.folder, terms_of(job.plan)) is None


def _hold(job: Job, released: Parcel | None = None, lengths: tuple[float, float] = (0.0, 0.0)) -> None:
    """Wait until somebody at this site lets it leave.

    Args:
        released: what would leave; None where nothing was computed yet.
    """
    plan, folder = job.plan, job.folder
    summary = _waiting(plan)
    if released:
        summary |= {
            **{"train": plan.train, "encoding": plan.encoding},
            **{"numbers": dict(released.scalars), "bytes": released.size(), "arrays": len(released.arrays)},
            **{"norm": lengths[0], "norm_of_model": lengths[1], "sha256": digest_of(released.arrays)},
        }
    write_json(folder / HELD, summary)
    record(folder / AUDIT, "out", plan.round, "held until somebody here approves it", released)
    job.say(events.ReplyHeld(action=plan.action, **_for_people(job)))
    (folder / "work" / STARTS).unlink(missing_ok=True)  # whoever waits has survived the work, however often it waits
    if not wait_for_decision(folder, terms_of(plan), job.superseded):
        raise Superseded


def _waiting(plan: RoundPlan) -> dict[str, Any]:
    """What a person is asked about, before anything was computed."""
    return {"terms": terms_of(plan).model_dump(mode="json"), "round": plan.round, "rounds": plan.rounds}


def _for_people(job: Job) -> dict[str, Any]:
    fingerprint = terms_of(job.plan).fingerprint()
    return {"round": job.plan.round, "fingerprint": fingerprint, "folder": str(job.folder)}


def check_policy(settings: SiteSettings, plan: RoundPlan, folder: Path) -> str:
    """See that anything of this site's images may leave for this federation; returns how its terms were agreed to, if
    that was now.

    Raises:
        PolicyRefused, NotApproved: it may not.
    """
    if settings.policy.require_dp:
        raise PolicyRefused(
            "the site's policy wants training with differential privacy (require-dp), which this version does not have"
        )
    problem = settings.policy.problem_of_work(plan.local_images, plan.batch_size) if plan.action == "train" else None
    if problem:
        raise PolicyRefused(problem)
    return agree(folder, terms_of(plan), settings.policy, settings.approve)


def _begin(job: Job, weights: dict[str, Tensor], packed: Document) -> None:
    """See that the work may be done, before any image is looked at.

    Raises:
        PolicyRefused, NotApproved, PlanRefused: it may not.
    """
    plan = job.plan
    how = check_policy(job.settings, plan, job.folder)
    if how:
        job.say(events.TermsAgreed(how=how, fingerprint=terms_of(plan).fingerprint()))
    check_weights(job, weights, packed)
    if not _is_undecided(job):
        return
    if plan.action == "finish":
        raise NotApproved("nobody here approved this federation before it ended (approve-first-round)")
    if plan.action == "train":  # which may take longer than the coordinator waits: a person can decide meanwhile
        write_json(job.folder / HELD, _waiting(plan))
        job.say(events.ApprovalWanted(**_for_people(job)))
    else:
        _hold(job)


def _prepare(job: Job, weights: dict[str, Tensor]) -> tuple[Network, LocalImages]:
    """The model on its device, and the slice; what is asked counts from here on."""
    plan, settings, folder = job.plan, job.settings, job.folder
    shape = plan.model.model
    images = local_images(settings, folder, shape.image_size, shape.channels)
    problem = settings.policy.problem_of_slice(len(images.train))
    if problem:
        raise PolicyRefused(problem)
    check_allowance(job, FAILURES)
    kind = UPDATES if plan.action == "train" else MEASUREMENTS
    (check_allowance if _is_undecided(job) else use_allowance)(job, kind)
    if (plan.round == 1 and plan.action != "evaluate") or plan.action == "finish":
        summary = images.corpus.summary()
        job.say(events.DataFound(summary=summary, train=len(images.train), held_out=len(images.held_out)))
        for warning in compare(images.corpus, plan.model):
            job.say(events.DataDoubtful(reason=warning))
    return model_from(weights, shape, pick_device(settings.device)), images
