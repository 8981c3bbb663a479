"""Writes down what comes in, before anything is done with it."""

import hashlib
from dataclasses import replace
from pathlib import Path

from maskdm.federated import auditlog
from maskdm.federated.auditlog import Message, message_of
from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.run.tensorfile import unpack

from .gate import COORDINATOR


def record_plan(audit: Path, exchange: int, document: str, weights: bytes) -> int:
    """Write down a plan with its weights, which nobody has looked at yet; returns its round, 1 where it is no plan."""
    plan = _plan_in(document)
    verdict, round_number = (plan.action, plan.round) if plan else ("no plan", 1)
    try:
        message = message_of(Parcel(unpack(weights), {"exchange": exchange}, document))
    except ValueError:
        verdict += ", weights that cannot be read"
        size = len(document.encode()) + len(weights)
        message = Message(size, {"exchange": exchange}, {}, hashlib.sha256(weights).hexdigest())
    _record(audit, round_number, verdict, message)
    return round_number


def record_progress_question(audit: Path, round_number: int, exchange: int) -> None:
    """Write down that the coordinator asks how far the work is."""
    _record(audit, round_number, "how far", message_of(Parcel({}, {"exchange": exchange})))


def record_foreign(audit: Path, size: int) -> None:
    """Write down a message of so many bytes that is none of a coordinator's."""
    _record(audit, 1, "refused: not what a coordinator sends", replace(auditlog.NOTHING, bytes=size))


def _record(audit: Path, round_number: int, verdict: str, message: Message) -> None:
    auditlog.record(audit, "in", COORDINATOR, round_number, verdict, message)


def _plan_in(document: str) -> RoundPlan | None:
    try:
        return RoundPlan.model_validate_json(document)
    except ValueError:
        return None
