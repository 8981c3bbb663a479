"""Writes down what comes in, before anything is done with it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskdm.federated import auditlog
from maskdm.federated.auditlog import Message, message_of
from maskdm.federated.parcel import Parcel
from maskdm.run.tensorfile import unpack

from .gate import COORDINATOR

ACTIONS = ("train", "measure", "evaluate", "finish")


def record_plan(audit: Path, exchange: int, document: str, weights: bytes) -> int:
    """Write down a plan with its weights, which nobody has looked at yet; the round that it says it is of, 1 where it
    says none."""
    plan = _plan_in(document)
    action = plan.get("action")
    verdict = action if action in ACTIONS else "no plan"
    try:
        message = message_of(Parcel(unpack(weights), {"exchange": exchange}, document))
    except ValueError:
        verdict += ", weights that cannot be read"
        size = len(document.encode()) + len(weights)
        message = Message(size, {"exchange": exchange}, {}, hashlib.sha256(weights).hexdigest())
    round_number = _round_of(plan)
    _record(audit, round_number, verdict, message)
    return round_number


def record_progress_question(audit: Path, round_number: int, exchange: int) -> None:
    """Write down that the coordinator asks how far the work is."""
    _record(audit, round_number, "how far", message_of(Parcel({}, {"exchange": exchange})))


def record_foreign(audit: Path, size: int) -> None:
    """Write down a message of so many bytes that is none of a coordinator's."""
    _record(audit, 1, "refused: not what a coordinator sends", replace(auditlog.NOTHING, bytes=size))


def _round_of(plan: Mapping[str, Any]) -> int:
    number = plan.get("round")
    return number if type(number) is int and 1 <= number <= 100_000 else 1


def _record(audit: Path, round_number: int, verdict: str, message: Message) -> None:
    auditlog.record(audit, "in", COORDINATOR, round_number, verdict, message)


def _plan_in(document: str) -> dict[str, Any]:
    try:
        plan = json.loads(document)
    except (ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}
